"""Sources, readers and streams: the same batches for any number of readers, resumed exactly, whatever the data."""
import io
import json
import multiprocessing
import signal
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from made import image, saved, write

import flowtok.data.images as images
import flowtok.data.loader as streams
from flowtok.data.images import _MAX_CAPTION, Skip, captions_of, find_shards, read_samples, read_shard
from flowtok.data.mixture import (ImageReader, DataSource, TokenReader, _check_filters, _choose_caption, find_sources, paper_sources,
                             use_sample)
from flowtok.data.loader import NoSamples, _shuffle_buffer, open_batches, _part_of_pass


# sources ---------------------------------------------------------------------------------------------------

def test_list_of_sources(folder, tmp_path):
    file = tmp_path / 'sources.json'
    file.write_text(json.dumps([{'preset': 'laion-art', 'shards': str(folder), 'max_aspect': 3, 'weight': 2},
                                {'shards': 'https://example.org/{0..3}.tar', 'caption_key': 'title'}]))
    first, second = find_sources(file)
    assert first == replace(paper_sources['laion-art'], shards=str(folder), max_aspect=3, weight=2)
    assert second == DataSource('https://example.org/{0..3}.tar', caption_key='title')
    write(tmp_path / 'beside' / '0.tar', [{'txt': b'a'}])
    file.write_text('[{"shards": "beside"}]')
    assert find_sources(file) == [DataSource(str(tmp_path / 'beside'))]


@pytest.mark.parametrize('text, error, named', [
    ('[{"shards": ', ValueError, 'JSON'),
    ('[]', ValueError, 'sources.json'),
    ('["train"]', ValueError, 'sources.json'),
    ('[{"weight": 2}]', ValueError, '1.*shards'),
    ('[{"shards": "nowhere"}]', FileNotFoundError, 'nowhere'),
    ('[{"shards": "x", "preset": "coco"}]', ValueError, 'coco.*datacomp'),
    ('[{"shards": "x", "max_ratio": 2}]', ValueError, 'max_ratio'),
    ('[{"shards": "x", "weight": "2"}]', ValueError, "weight.*float.*'2'"),
    ('[{"shards": "x", "weight": 0}]', ValueError, 'weight.*0'),
    ('[{"shards": "x", "recaption_probability": 95}]', ValueError, 'recaption_probability.*95|95'),
])
def test_wrong_list_gets_a_sentence(tmp_path, text, error, named):
    (tmp_path / 'sources.json').write_text(text)
    with pytest.raises(error, match=named):
        find_sources(tmp_path / 'sources.json')
    with pytest.raises(FileNotFoundError):
        find_sources(tmp_path / 'other.json')


def test_filters_are_those_of_table_5():
    def passes(source, facts, **files):
        try:
            _check_filters({'json': json.dumps(facts).encode(), **files}, source)
        except Skip as reason:
            return str(reason)
    strict = paper_sources['datacomp-6']
    good = dict(original_width=511, original_height=256, width=64, height=64, AESTHETIC_SCORE=6.01, pwatermark=.5)
    assert passes(strict, good) is None
    for key, value, reason in [('original_width', 512, 'aspect ratio'), ('original_height', 1022, 'aspect ratio'),
                               ('AESTHETIC_SCORE', 6., 'aesthetic score'), ('pwatermark', .501, 'watermark'),
                               ('AESTHETIC_SCORE', None, 'aesthetic score unknown'),
                               ('pwatermark', 'high', 'watermark unknown')]:
        assert passes(strict, good | {key: value}) == reason
    assert passes(strict, good | dict(original_width=255, original_height=200)) == 'resolution'
    assert passes(strict, good | dict(original_width=100, original_height=256)) == 'aspect ratio'
    sized = DataSource('', max_aspect=2., min_side=256)
    assert passes(sized, dict(width=300, height=299)) is None                    # where the original size is not told
    assert passes(sized, {}) == 'size unknown' and passes(sized, {}, png=image(300, 299)) is None
    assert passes(sized, {}, png=image(16, 16)) == 'resolution'
    assert passes(DataSource(''), {}) is None


# samples ---------------------------------------------------------------------------------------------------

def test_recaptions_come_as_often_as_they_should():
    source = DataSource('', recaption_key='recap_txt', recaption_probability=.9)
    sample = {'txt': b'alt', 'recap_txt': b'The image displays two cats.', 'json': b'{"told": "The image of a cat"}'}
    said = Counter(_choose_caption(dict(sample), source, np.random.default_rng(i)) for i in range(1000))
    assert set(said) == {'Two cats.', 'alt'} and 870 < said['Two cats.'] < 930
    always = replace(source, recaption_key='told', recaption_probability=1.)
    assert _choose_caption(sample, always, np.random.default_rng(0)) == 'The image of a cat'
    assert _choose_caption({'txt': b'alt'}, always, np.random.default_rng(0)) == 'alt'        # there is none: no loss


def test_one_of_many_captions_or_the_first():
    sample = {'json': json.dumps({'captions': ['a', 'b', 'c']}).encode()}
    draw = lambda first: {_choose_caption(sample, DataSource(''), np.random.default_rng(i), first) for i in range(30)}
    assert draw(True) == {'a'} and draw(False) == {'a', 'b', 'c'}


def claim_size(png, width, height):
    "A png whose header says another size"
    head = b'IHDR' + width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + png[24:29]
    return png[:12] + head + zlib.crc32(head).to_bytes(4, 'big') + png[33:]


ok = image(32, 32)
photo = image(32, 32, kind='jpeg')
faults = {
    'dropped: broken image': [{'jpg': photo[:-200]}, {'png': ok[:len(ok) // 2]}],
    'dropped: not an image': [{'jpg': b''}, {'jpg': b'<html>'}, {'jpg': bytes(1000)}],
    'dropped: image too small': [{'png': image(1, 1)}, {'png': image(1, 300)}],
    'dropped: image too large': [{'png': claim_size(ok, 30_000, 30_000)}, {'png': claim_size(ok, 30_000, 40)},
                                   {'png': claim_size(ok, 10_000, 10_000)}],
    'dropped: image too narrow': [{'png': saved(Image.new('L', (16_000, 8)))}],
    'dropped: no image': [{}],
    'dropped: no caption': [{'png': ok, 'txt': None}],
    'dropped: empty caption': [{'png': ok, 'txt': b''}, {'png': ok, 'txt': b' \n\t'}],
    'repaired: caption cut': [{'png': ok, 'txt': b'long ' * 20_000}],
    'repaired: txt not UTF-8': [{'png': ok, 'txt': b'sch\xf6n'}],
    'repaired: json not readable': [{'png': ok, 'json': b'{"caption": '}, {'png': ok, 'json': b'[1]'},
                                    {'png': ok, 'json': b'[' * 100_000}],
    'repaired: json not UTF-8': [{'png': ok, 'json': b'{"caption": "sch\xf6n"}'}],
    'repaired: image in CMYK': [{'jpg': image(mode='CMYK', kind='jpeg')}],
    'repaired: image in P': [{'png': image(mode='P')}],
    'repaired: image in RGBA': [{'png': image(mode='RGBA')}],
    'repaired: image in I;16': [{'png': saved(Image.fromarray(np.zeros((16, 16), np.uint16)))}],
    'repaired: image enlarged': [{'png': image(15, 40)}, {'png': image(15, 8)}],
    'repaired: first image of several': [{'png': saved(Image.new('RGB', (16, 16)), 'gif', save_all=True,
                                                        append_images=[Image.new('RGB', (16, 16), 'red')])}],
}


@pytest.mark.parametrize('reason', faults)
def test_every_fault_is_counted_under_its_reason(reason, tmp_path):
    changed = [{'txt': b'a caption', **files} for files in faults[reason]]
    shard = write(tmp_path / '0.tar', [{k: v for k, v in sample.items() if v is not None} for sample in changed])
    counts, rng, size = Counter(), np.random.default_rng(0), 16 if reason.startswith('repaired') else 256
    rows = [use_sample(sample, DataSource(''), ImageReader(size), rng, counts) for sample in read_samples([shard], counts)]
    wanted = {reason: len(changed)} | ({'kept': len(changed)} if reason.startswith('repaired') else {})
    if reason != 'repaired: first image of several':                           # a gif is in P, too
        assert counts == wanted
    assert counts[reason] == len(changed) and sum(row is not None for row in rows) == counts['kept']
    assert all(len(row[1]) <= _MAX_CAPTION and row[0].shape == (size, size, 3) for row in rows if row)


def test_missing_json_is_fine_and_the_limit_is_an_argument(tmp_path):
    counts, rng = Counter(), np.random.default_rng(0)
    sample = {'png': ok, 'txt': b'a'}
    assert use_sample(dict(sample), DataSource(''), ImageReader(8), rng, counts) and counts == {'kept': 1}
    assert use_sample(dict(sample), DataSource(''), ImageReader(8, max_pixels=1000), rng, counts) is None
    assert counts == {'kept': 1, 'dropped: image too large': 1}


def test_released_layout_and_broken_tokens(tmp_path):
    tokens = np.arange(32 * 77, dtype='<f2').reshape(32, 77) / 100
    files = [{'token.npy': tokens.tobytes(), 'txt': b'a', 'recap_txt': b'The image shows a dog.'}]
    broken = b'', b'abc', tokens.tobytes()[:64 * 5], (tokens + np.inf).tobytes()
    files += [{'token.npy': bad, 'txt': b'a'} for bad in broken]
    write(tmp_path / '0.tar', files + [{'txt': b'a'}])
    source, counts = DataSource(str(tmp_path), recaption_key='recap_txt', recaption_probability=1.), Counter()
    rows = [use_sample(sample, source, TokenReader(16, num_tokens=77), np.random.default_rng(0), counts)
            for sample in read_samples(find_shards(tmp_path))]
    assert counts == {'kept': 1, 'dropped: broken tokens': 4, 'dropped: no tokens': 1}
    assert rows[0][1] == 'A dog.' and np.array_equal(rows[0][0], tokens.T.astype(np.float32))


# streams ---------------------------------------------------------------------------------------------------

def name_reader(sample, source, rng):
    return np.array([rng.integers(1000), source.weight]), captions_of(sample)[0]


def take(run, n):
    return [next(run) for _ in range(n)]


def global_batches(sources, n, world_size, workers, read=name_reader, position=None, **how):
    "n whole batches, put together from the rows of all processes; the merged position, the counts"
    runs = [open_batches(sources, read, rank=rank, world_size=world_size, workers=workers, position=position, **how)
            for rank in range(world_size)]
    batches = []
    for _ in range(n):
        parts = [next(run) for run in runs]
        rows = [row for group in zip(*(zip(*part) for part in parts)) for row in group]
        batches.append((np.stack([row[0] for row in rows]), [row[1] for row in rows]))
    position = {number: at for run in runs for number, at in run.position.items()}
    return batches, position, sum((run.counts for run in runs), Counter())


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x[0], y[0]) and x[1] == y[1] for x, y in zip(a, b))


def test_visits_of_all_streams_are_epochs():
    for shards, S in ((3, 8), (8, 3), (5, 5)):
        visits = [_part_of_pass(n // S, n % S, S, shards, 7, 0) for n in range(shards * 6)]
        epochs = [tuple(visits[i:i + shards]) for i in range(0, len(visits), shards)]
        assert all(sorted(epoch) == list(range(shards)) for epoch in epochs) and len(set(epochs)) > 1


def test_mixing_loses_nothing():
    for size in (1, 3, 50):
        mixed = list(_shuffle_buffer(iter(range(20)), size, np.random.default_rng(0)))
        assert sorted(mixed) == list(range(20)) and (mixed == list(range(20))) == (size == 1)


@pytest.fixture(scope='module')
def two_sources(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp('other')
    write(other / '0.tar', [{'png': image(seed=i)} | ({'txt': b'other'} if i % 3 else {}) for i in range(9)])
    (other / '1.tar').write_bytes(b'')
    return [DataSource(str(folder), weight=3.), DataSource(str(other))]


@pytest.mark.parametrize('world_size, workers', [(1, 2), (2, 0), (2, 2), (4, 3)])
def test_batches_do_not_depend_on_who_reads(two_sources, world_size, workers):
    how = dict(batch_size=16, seed=3, streams=8, shuffle=32)
    alone = global_batches(two_sources, 12, 1, 0, **how)
    together = global_batches(two_sources, 12, world_size, workers, **how)
    assert same(alone[0], together[0]) and alone[1:] == together[1:]
    assert alone[2]['kept'] == 12 * 16 and alone[2]['dropped: no caption'] and alone[2]['shard: empty']
    other = global_batches(two_sources, 12, 1, 0, **how | {'seed': 4})
    assert not same(alone[0], other[0])


@pytest.mark.parametrize('world_size, workers', [(1, 0), (1, 2), (2, 0), (2, 2)])
@pytest.mark.parametrize('n', [1, 9])
def test_resumed_batches_go_on_bit_by_bit(two_sources, n, world_size, workers):
    how = dict(batch_size=16, seed=3, streams=8, shuffle=32)
    through = global_batches(two_sources, n + 9, 1, 0, **how)
    position = json.loads(json.dumps(global_batches(two_sources, n, 2, 2, **how)[1]))
    rest = global_batches(two_sources, 9, world_size, workers, position=position, **how)
    assert same(through[0][n:], rest[0]) and through[1:] == rest[1:]


def test_images_crops_and_flips_are_resumed_too(tmp_path):
    write(tmp_path / '0.tar', [{'png': image(20, 30, i), 'txt': b'a'} for i in range(8)])
    sources, read = [DataSource(str(tmp_path))], ImageReader(16, augment=True)
    run = open_batches(sources, read, 4)
    take(run, 3)
    position = run.position                                                      # must not move on with the run
    rest = take(run, 3)
    assert same(rest, take(open_batches(sources, read, 4, position=position, workers=2), 3))
    assert not same(rest[:1], take(open_batches(sources, read, 4), 1))


def test_resuming_reads_one_shard_a_stream_and_decodes_nothing_twice(folder, monkeypatch):
    opened, decoded = [], []
    follow = lambda shard, *how: (opened.append(shard), read_shard(shard, *how))[1]
    monkeypatch.setattr(streams, 'read_shard', follow)
    read = lambda sample, source, rng: (decoded.append(sample['__key__']), (np.zeros(1), ''))[1]
    run = open_batches([DataSource(str(folder))], read, 4)
    take(run, 10)
    position, before = run.position, len(opened)
    again = open_batches([DataSource(str(folder))], read, 4, position=position)
    opened.clear()
    decoded.clear()
    next(again)
    assert before > 4 and len(opened) == 4 and len(decoded) == 4


def test_one_epoch_reads_everything_once(folder):
    run = open_batches([DataSource(str(folder))], name_reader, 5, shuffle=10)
    assert sorted(text for _, texts in take(run, 7) for text in texts) == sorted(f'number {i}' for i in range(35))


@pytest.mark.parametrize('shards, samples, world_size, workers', [(1, 1000, 1, 0), (1, 1000, 2, 2), (3, 1000, 1, 2), (24, 400, 1, 0), (24, 400, 4, 0), (50, 200, 2, 0)])
def test_small_sets_are_read_evenly(shards, samples, world_size, workers, tmp_path):
    "As many different samples as an even draw would give, in 100 batches and in every single one, also of a set sorted by class."
    for shard in range(shards):
        write(tmp_path / f'{shard:05d}.tar', [{'txt': f'{shard * samples + i}'.encode()} for i in range(samples)])
    batches, _, counts = global_batches([DataSource(str(tmp_path))], 100, world_size, workers, batch_size=64, seed=1)
    numbers = np.array([[int(text) for text in texts] for _, texts in batches])
    n = shards * samples
    assert len(np.unique(numbers)) >= .95 * min(n, numbers.size) and counts['kept'] == 6400
    assert np.mean([len(np.unique(batch)) for batch in numbers]) >= .95 * 64
    assert np.bincount(numbers.flatten(), minlength=n).max() <= -(-numbers.size // n) + 2
    classes = numbers * 10 // n                                 # ten classes, one after the other
    assert np.mean([len(np.unique(batch)) for batch in classes]) > 9


def test_parts_of_a_large_shard_are_its_samples_once(tmp_path, monkeypatch):
    "Of a shard too large to keep in memory, each part reads its own samples only; what is wrong is counted once."
    monkeypatch.setattr(images, '_SHARD_CACHE_BYTES', 0)
    write(tmp_path / '0.tar', [{'png': image(seed=i), 'txt': f'{i}'.encode()} for i in range(20)])
    with tarfile.open(tmp_path / '0.tar', 'a') as tar:
        tar.addfile(tarfile.TarInfo('../x.png'), io.BytesIO())
    for parts in (1, 3, 20, 33):
        faults = Counter()
        texts = [[captions_of(sample)[0] for sample in images.read_shard(str(tmp_path / '0.tar'), faults, part, parts)] for part in range(parts)]
        assert sorted(sum(texts, []), key=int) == [str(i) for i in range(20)] and texts[0] == [str(i) for i in range(0, 20, parts)]
        assert faults['file: unsafe name'] == parts
    run = open_batches([DataSource(str(tmp_path))], name_reader, 4)
    take(run, 5)
    assert run.counts['kept'] == 20 and run.counts['file: unsafe name'] <= 1


def test_sources_fill_their_share(two_sources):
    shares = Counter(array[0, 1] for array, _ in take(open_batches(two_sources, name_reader, 1), 600))
    assert 420 < shares[3] < 480


def test_what_cannot_be_shared_or_resumed_gets_a_sentence(folder):
    sources = [DataSource(str(folder))]
    for how in (dict(world_size=3), dict(streams=3), dict(streams=2, world_size=4)):
        with pytest.raises(ValueError):
            open_batches(sources, name_reader, 8, **how)
    run = open_batches(sources, name_reader, 8)
    with pytest.raises(ValueError, match='8.*4'):
        open_batches(sources, name_reader, 4, position=run.position)
    with pytest.raises(ValueError, match='2'):
        open_batches(sources * 2, name_reader, 8, position=run.position)
    assert len(open_batches(sources, name_reader, 4096).position) == 64


def test_reading_leaves_the_random_state_of_training_alone(folder):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    take(open_batches([DataSource(str(folder))], name_reader, 4, workers=2), 2)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('workers', [0, 2])
def test_hopeless_data_end_with_a_sentence(folder, tmp_path, workers, monkeypatch):
    write(tmp_path / 'bad' / 'pages.tar', [{'jpg': b'<html>', 'txt': b'a'}] * 5)
    for name, content in ('empty', b''), ('no members', bytes(10240)), ('letter', b'Dear Sir or Madam, ' * 500):
        (tmp_path / 'bad' / f'{name}.tar').write_bytes(content)
    sources = [DataSource(str(folder)), DataSource(str(tmp_path / 'bad'))]
    run = open_batches(sources, ImageReader(16), 4, workers=workers)
    with pytest.raises(NoSamples, match='bad.*4.*4') as told:
        take(run, 100)
    assert '\n' not in str(told.value)
    monkeypatch.setattr(streams, '_PATIENCE', 20)
    with pytest.raises(NoSamples, match='3.*5.*20'):
        take(open_batches([DataSource(str(folder), aesthetic_key='score')], ImageReader(16), 4, workers=workers), 1)


def test_few_good_samples_are_enough_also_after_a_break(tmp_path):
    write(tmp_path / '0.tar', [{'txt': b'good'}] + [{'png': b''}] * 20)
    for k in range(1, 4):
        (tmp_path / f'{k}.tar').write_bytes(b'')
    run = open_batches([DataSource(str(tmp_path))], name_reader, 2)
    for _ in range(40):
        next(run)
        run = open_batches([DataSource(str(tmp_path))], name_reader, 2, position=run.position)
    assert run.counts['kept'] == 80 and run.counts['shard: empty']


def test_workers_ignore_the_signals_of_training_and_leave_with_it(folder):
    code = f'''
import time
from flowtok.data.mixture import *
from flowtok.data.loader import *
run = open_batches([DataSource({str(folder)!r})], ImageReader(16), 4, workers=2)
for _ in run:
    print('batch', flush=True)
    time.sleep(.05)
'''
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b'batch\n'
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(signal.SIGINT)
        worker.send_signal(signal.SIGTERM)
    assert all(process.stdout.readline() == b'batch\n' for _ in range(20))
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def read_and_end(folder):
    run = open_batches([DataSource(folder)], ImageReader(16), 4, workers=2)
    next(run)
    globals()['kept_to_the_end'] = run                                           # nobody collects it before


@pytest.mark.parametrize('script', [False, True])
def test_a_process_that_still_reads_can_end(script, folder):
    if script:
        code = f'from flowtok.data.mixture import *; from flowtok.data.loader import *; r = open_batches([DataSource({str(folder)!r})], ImageReader(16), 4, workers=2); next(r)'
        assert subprocess.run([sys.executable, '-c', code], timeout=60).returncode == 0
    else:
        process = multiprocessing.get_context('fork').Process(target=read_and_end, args=(str(folder),))
        process.start()
        process.join(60)
        assert process.exitcode == 0


def test_memory_does_not_grow(tmp_path):
    for k in range(4):
        write(tmp_path / f'{k}.tar', [{'png': image(32, 32, i), 'txt': b'a', 'json': b'{}'} for i in range(50)])
    run, process = open_batches([DataSource(str(tmp_path))], ImageReader(32), 20, shuffle=40), psutil.Process()
    take(run, 150)
    before = process.memory_info().rss
    take(run, 150)                                                               # 3,000 samples, 15 times the data
    assert process.memory_info().rss - before < 2e6
