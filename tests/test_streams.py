"""Streams of samples: the same for any number of readers, resumed exactly, and not stopped by bad data."""
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from flowtok.scenes import write_shards
from flowtok.streams import (MAX_CAPTION, ImageReader, Skip, Source, TokenReader, find_sources, largest_divisor, open_batches,
                             open_image)


def picture(size=(40, 30), mode='RGB', colour=0, kind='PNG', **how):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind, **how)
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, 'w') as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp('scenes')
    write_shards(folder, 'train', 60, samples_per_shard=20)
    return [Source(str(folder))]


def read(sources, n, **how):
    batches = open_batches(sources, ImageReader(16, augment=True), 8, seed=3, **how)
    return [next(batches) for _ in range(n)], batches


def same(a, b): return all(np.array_equal(x[0], y[0]) and x[1] == y[1] for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize('world_size, workers', [(1, 2), (2, 0), (2, 2), (4, 1)])
def test_a_batch_is_the_same_for_any_number_of_readers(shards, world_size, workers):
    whole, _ = read(shards, 12)
    for rank in range(world_size):
        part, _ = read(shards, 12, rank=rank, world_size=world_size, workers=workers)
        assert same(part, [(pixels[rank::world_size], captions[rank::world_size]) for pixels, captions in whole])


def test_reading_goes_on_exactly_with_other_readers(shards):
    whole, at_the_end = read(shards, 30)
    halves = [read(shards, 13, rank=rank, world_size=2, workers=2)[1] for rank in (0, 1)]
    position = json.loads(json.dumps(halves[0].position | halves[1].position))
    rest, batches = read(shards, 17, position=position, workers=2)
    assert same(rest, whole[13:]) and batches.counts == at_the_end.counts == {'kept': 240}


def test_other_seeds_and_epochs_have_another_order(shards):
    first = [[caption for _, captions in read(shards, 8)[0] for caption in captions]]
    batches = open_batches(shards, ImageReader(16), 8, seed=4)
    first.append([caption for _ in range(8) for caption in next(batches)[1]])
    assert first[0] != first[1]


def test_sources_are_drawn_by_their_weights(tmp_path):
    for name in 'ab':
        write_tar(tmp_path / f'{name}.tar', {f'{i}.{kind}': data for i in range(9) for kind, data in (('png', picture()), ('txt', name.encode()))})
    sources = [Source(str(tmp_path / 'a.tar'), weight=3.), Source(str(tmp_path / 'b.tar'))]
    batches = open_batches(sources, ImageReader(8), 16)
    said = [caption for _ in range(50) for caption in next(batches)[1]]
    assert .7 < said.count('a') / len(said) < .8


@pytest.mark.parametrize('source, about, why', [
    (dict(max_aspect=2.), dict(width=20, height=10), 'too long and narrow'), (dict(max_aspect=2.), dict(width=19, height=10), None),
    (dict(min_side=256), dict(original_width=255, original_height=9, width=999), 'too small by its json'),
    (dict(min_aesthetic=5.), {'AESTHETIC_SCORE': 5.}, 'aesthetic score too low or missing'), (dict(min_aesthetic=5.), {}, 'aesthetic score too low or missing'),
    (dict(max_watermark=.5), dict(pwatermark=.6), 'watermark likely'), (dict(max_watermark=.5), dict(pwatermark=.5), None)])
def test_filters_of_table_5(source, about, why):
    assert Source('x', **source).refuses(about) == why


def test_lists_of_sources(tmp_path):
    path = tmp_path / 'data.json'
    path.write_text(json.dumps([{'preset': 'cc12m', 'shards': 'a.tar', 'weight': 2}, {'shards': 'b.tar'}]))
    assert find_sources(str(path)) == [Source('a.tar', 2, max_aspect=2., min_side=256, max_watermark=.5), Source('b.tar')]
    for listed, sentence in (([{'shard': 'a'}], 'a source has shards'), ([{'shards': 'a', 'preset': 'x'}], "preset 'x'"), ([3], 'holds 3')):
        path.write_text(json.dumps(listed))
        with pytest.raises(ValueError, match=sentence):
            find_sources(str(path))


def test_a_second_caption_is_taken_with_its_probability(tmp_path):
    write_tar(tmp_path / 'a.tar', {'1.png': picture(), '1.txt': b'own', '1.recap_txt': b'other'})
    source = Source(str(tmp_path), recaption_key='recap_txt', recaption_probability=.9)
    batches = open_batches([source], ImageReader(8), 8)
    said = [caption for _ in range(50) for caption in next(batches)[1]]
    assert .83 < said.count('other') / len(said) < .97 and set(said) == {'own', 'other'}


@pytest.mark.parametrize('mode, colour, kind, seen', [
    ('CMYK', (0, 255, 255, 0), 'JPEG', (254, 0, 0)), ('P', 7, 'PNG', None), ('I;16', 65535, 'PNG', (255, 255, 255)),
    ('RGBA', (0, 0, 0, 0), 'PNG', (255, 255, 255)), ('LA', (0, 255), 'PNG', (0, 0, 0)), ('1', 1, 'PNG', (255, 255, 255))])
def test_pictures_of_every_kind_become_rgb(mode, colour, kind, seen):
    image = open_image(picture(mode=mode, colour=colour, kind=kind))
    assert image.mode == 'RGB' and (seen is None or np.abs(np.array(image.getpixel((0, 0))) - seen).max() <= 2)


def test_pictures_are_turned_as_the_camera_was_held():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(picture((40, 30), kind='JPEG', exif=exif)).size == (30, 40)


def test_of_animations_the_first_frame_is_taken():
    frames = [Image.new('RGB', (20, 20), colour) for colour in ('red', 'blue')]
    file = io.BytesIO()
    frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:])
    assert open_image(file.getvalue()).getpixel((0, 0))[0] > 250


@pytest.mark.parametrize('data, why', [
    (b'', 'broken picture'), (b'no picture at all', 'broken picture'), (picture((400, 300))[:60], 'broken picture'),
    (picture((1, 1)), 'picture too small'), (picture((30_000, 5000), '1'), 'picture too large')])
def test_what_is_no_usable_picture_is_skipped(data, why):
    with pytest.raises(Skip, match=why):
        open_image(data)


bad_members = {
    'a.png': picture(), 'a.txt': b'good', 'b.png': b'no picture', 'b.txt': b'text', 'c.png': picture(), 'd.txt': b'no picture beside',
    'e.png': picture(), 'e.txt': b'  ', 'f.png': picture(), 'f.txt': b'x' * 100_000, 'g.png': picture(), 'g.txt': b'\xff\xfe caption',
    'h.png': picture((1, 1)), 'h.txt': b'small', 'i.png': picture(), 'i.txt': b'text', 'i.json': b'{broken',
    '../j.png': picture(), '../j.txt': b'out of the folder', '/k.png': picture(), '/k.txt': b'absolute'}


@pytest.mark.parametrize('workers', [0, 2])
def test_bad_samples_are_counted_and_passed_over(workers, tmp_path):
    write_tar(tmp_path / '0.tar', bad_members)
    (tmp_path / '1.tar').write_bytes(b'')
    whole = (tmp_path / '0.tar').read_bytes()
    (tmp_path / '2.tar').write_bytes(whole[:len(whole) // 3])
    batches = open_batches([Source(str(tmp_path))], ImageReader(8), 4, workers=workers)
    said = [caption for _ in range(12) for caption in next(batches)[1]]
    assert set(said) == {'good', 'x' * MAX_CAPTION, '\ufffd\ufffd caption'}
    assert batches.counts.keys() >= {'kept', 'broken picture', 'no caption', 'no picture', 'picture too small', 'broken json', 'unsafe name'}
    assert batches.counts['kept'] == 48


@pytest.mark.parametrize('workers', [0, 2])
def test_nothing_usable_ends_in_a_sentence(workers, tmp_path):
    write_tar(tmp_path / '0.tar', {name: data for name, data in bad_members.items() if name[0] in 'bd'})
    (tmp_path / '1.tar').write_bytes(b'no tar')
    with pytest.raises(ValueError, match=r'^No usable sample in .*broken picture') as error:
        next(open_batches([Source(str(tmp_path))], ImageReader(8), 4, workers=workers))
    assert 'Traceback' not in str(error.value)


def test_a_missing_shard_is_passed_over(shards, tmp_path):
    write_tar(tmp_path / '0.tar', {'a.png': picture(), 'a.txt': b'good'})
    batches = open_batches([Source('pipe:cat ' + str(tmp_path / '{0,1}.tar'))], ImageReader(8), 4)
    assert {caption for _ in range(4) for caption in next(batches)[1]} == {'good'}
    assert batches.counts['broken shard'] + batches.counts['missing shard'] > 0


def test_the_released_token_layout_is_read(tmp_path):
    moments = np.arange(2 * 4 * 5, dtype='<f2')
    write_tar(tmp_path / '0.tar', {'a.token.npy': moments.tobytes(), 'a.txt': b'good', 'b.token.npy': b'odd', 'b.txt': b'bad'})
    tokens, said = next(open_batches([Source(str(tmp_path))], TokenReader(4), 2))
    assert set(said) == {'good'} and np.array_equal(tokens[0], moments.reshape(8, 5).T)


def test_streams_divide_the_batch():
    assert [largest_divisor(n, 64) for n in (4096, 1024, 96, 7, 1)] == [64, 64, 48, 7, 1]
