"""The token cache: what 08d_cache promises and its lessons do not show."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made import image, write

from flowtok.data.token_cache import write_token_cache
from flowtok.data.images import captions_of, decode_image, find_shards, read_moments, read_samples
from flowtok.data.mixture import DataSource, TokenReader, _choose_caption, find_sources
from flowtok.data.loader import NoSamples, open_batches


def encode(pixels):
    return pixels.reshape(len(pixels), 8, -1)[:, :, :6] / 255.


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob('*.tar'))}


def test_token_cache_round_trip_and_reuse(folder, tmp_path):
    sources = find_sources(folder)
    cache = write_token_cache(sources, encode, tmp_path / 'cache', 16, tokenizer='t', batch_size=4)
    tokens, originals = read_samples(find_shards(cache)), read_samples(find_shards(folder))
    for cached, sample in zip(tokens, originals, strict=True):
        assert len(cached['token.npy']) == 2 * 8 * 6 and cached['txt'] == sample['txt']
        assert np.abs(read_moments(cached, 3) - encode(decode_image(sample['png'], 16)[None])[0]).max() < 1e-3
    about = json.loads((cache / 'cache.json').read_text())
    assert about['samples'] == 35 and about['counts'] == {'kept': 35}
    assert (about['tokenizer'], about['size']) == ('t', 16)
    moments, captions = next(open_batches(find_sources(cache), TokenReader(3, num_tokens=8), 30))
    assert moments.shape == (30, 8, 6) and moments.dtype == np.float32 and captions[0].startswith('number')
    def never(pixels):
        raise AssertionError('a finished cache was written again')
    write_token_cache(sources, never, cache, 16, tokenizer='t')


def test_cache_of_other_origin_is_refused(folder, tmp_path):
    sources, cache = find_sources(folder), tmp_path / 'cache'
    class Stop(Exception):
        pass
    def stop(pixels):
        raise Stop
    with pytest.raises(Stop):
        write_token_cache(sources, stop, cache, 16, tokenizer='t')
    for finished in (False, True):
        for other, told in ((dict(tokenizer='u'), 'tokenizer'), (dict(size=8), 'size'),
                            (dict(sources=[replace(sources[0], min_side=9)]), 'data')):
            with pytest.raises(ValueError, match=f'{told}'):
                write_token_cache(**dict(sources=sources, encode=encode, folder=cache, size=16, tokenizer='t') | other)
        if not finished:
            with pytest.raises(ValueError):
                find_sources(cache)
            write_token_cache(sources, encode, cache, 16, tokenizer='t')
    with pytest.raises(ValueError):
        write_token_cache(sources, encode, folder, 16, tokenizer='t')            # a folder of other shards


@pytest.mark.parametrize('workers', [0, 2])
def test_killed_encoding_goes_on(folder, tmp_path, workers):
    sources = find_sources(folder)
    whole = contents(write_token_cache(sources, encode, tmp_path / 'whole', 16, batch_size=3))
    done = []
    def killed(pixels):
        if len(done) == 8:
            raise KeyboardInterrupt
        done.append(len(pixels))
        return encode(pixels)
    with pytest.raises(KeyboardInterrupt):
        write_token_cache(sources, killed, tmp_path / 'cache', 16, batch_size=3, workers=workers)
    kept = contents(tmp_path / 'cache')
    assert 0 < len(kept) < 5 and not (tmp_path / 'cache' / 'cache.json').exists()
    done = []
    def counted(pixels):
        done.append(len(pixels))
        return encode(pixels)
    write_token_cache(sources, counted, tmp_path / 'cache', 16, batch_size=3, workers=workers)
    assert contents(tmp_path / 'cache') == whole and sum(done) == 7 * (5 - len(kept))
    assert not list((tmp_path / 'cache').glob('**/*.part'))


def test_processes_share_the_encoding(folder, tmp_path):
    sources = find_sources(folder)
    whole = contents(write_token_cache(sources, encode, tmp_path / 'whole', 16))
    for rank in range(2):
        assert not (tmp_path / 'shared' / 'cache.json').exists()
        write_token_cache(sources, encode, tmp_path / 'shared', 16, rank=rank, world_size=2)
    assert contents(tmp_path / 'shared') == whole and (tmp_path / 'shared' / 'cache.json').exists()


def test_cache_keeps_sources_captions_and_facts_and_counts_the_rest(folder, tmp_path):
    facts = {'score': 7, 'exif': 'x' * 1000, 'title': 'told'}
    samples = [{'png': image(seed=i), 'txt': b'alt', 'recap_txt': b'The image shows it.',
                'json': json.dumps(facts).encode()} for i in range(4)]
    write(tmp_path / 'web' / '0.tar', samples + [{'png': b'?', 'json': b'{"title": "a"}'}])
    (tmp_path / 'web' / '1.tar').write_bytes(b'')
    web = DataSource(str(tmp_path / 'web'), weight=3., caption_key='title', recaption_key='recap_txt',
                 recaption_probability=.5)
    sources, seen = [DataSource(str(folder)), web], []
    bar = lambda keys: (seen.append(key) or key for key in keys)
    cache = write_token_cache(sources, encode, tmp_path / 'cache', 16, progress=bar)
    about = json.loads((cache / 'cache.json').read_text())
    assert about['counts'] == {'kept': 39, 'dropped: not an image': 1, 'shard: empty': 1} and len(seen) == 39
    plain, read = find_sources(cache)
    assert read == DataSource(str(cache / '01-*.tar'), weight=3., recaption_key='recap_txt', recaption_probability=.5)
    cached = next(read_samples(find_shards(read.shards)))
    assert captions_of(cached) == ['told']
    assert json.loads(cached['json']) == {'score': 7, 'title': 'told', 'captions': ['told']}
    assert {_choose_caption(cached, read, np.random.default_rng(i)) for i in range(20)} == {'told', 'It.'}
    write_token_cache([sources[0], replace(web, weight=5.)], encode, cache, 16)              # weights may change
    assert find_sources(cache)[1].weight == 5


def test_hopeless_source_leaves_no_cache(folder, tmp_path):
    write(tmp_path / 'bad' / '0.tar', [{'png': b'?', 'txt': b'a'}] * 3)
    with pytest.raises(NoSamples, match='2.*3'):
        write_token_cache([DataSource(str(folder)), DataSource(str(tmp_path / 'bad'))], encode, tmp_path / 'cache', 16)
    assert not (tmp_path / 'cache' / 'cache.json').exists()


def test_cache_that_cannot_be_written_names_the_folder(folder, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError):
        write_token_cache(find_sources(folder), encode, tmp_path / 'file' / 'cache', 16)
