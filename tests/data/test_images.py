"""Shards and samples: what 08_data promises and its lessons do not show."""
import gzip
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from made import image, saved, write
from PIL import Image

from flowtok.data import images as data
from flowtok.data.images import (Skip, captions_of, decode_image, find_shards, image_bytes, read_samples, read_shard, save_animation, show_grid,
                          to_images, to_pixels)
from flowtok.toy.shapes import write_shards


def test_shards_by_every_kind_of_name(folder, tmp_path):
    five = [str(folder / f'{k:05d}.tar') for k in range(5)]
    assert find_shards(folder) == find_shards(folder / '*.tar') == find_shards(f'{folder}/{{00000..00004}}.tar') == five
    assert find_shards(five[0]) == five[:1]
    assert find_shards('https://example.org/{0..2}.tar') == [f'https://example.org/{i}.tar' for i in range(3)]
    assert len(find_shards(f'{folder}/{{00000..00009}}.tar')) == 10              # gaps are counted when visited
    odd = tmp_path / 'a [b]'
    write(odd / '0.tar', [{'txt': b'a'}])
    assert len(find_shards(odd)) == 1
    for nowhere in (tmp_path / 'none', tmp_path, tmp_path / '{0..3}.tar'):
        with pytest.raises(FileNotFoundError):
            find_shards(nowhere)


def test_pipes_are_read_and_their_failures_counted(folder):
    faults = Counter()
    assert len(list(read_samples(find_shards(f'pipe:cat {folder}/{{00000..00001}}.tar'), faults))) == 14 and not faults
    assert not list(read_samples(['pipe:cat nowhere/at/all 2>/dev/null', 'http://127.0.0.1:9/0.tar'][:1], faults))
    assert faults == {'shard: missing': 1}



def test_captions_from_every_place():
    as_json = lambda **facts: {'json': json.dumps(facts).encode()}
    assert captions_of({'txt': b' a\n', **as_json(caption='b')}) == ['a']
    assert captions_of({'txt': b'a', **as_json(captions=['b', '', None, 3, 'c'])}) == ['b', 'c']
    assert captions_of({'txt': b'', **as_json(caption='b')}) == captions_of(as_json(caption='b')) == ['b']
    assert captions_of({'txt': b'a', 'alt': b'b', **as_json(title='c')}, 'title') == ['c']
    assert captions_of({'txt': b'a', 'alt': b'b'}, 'alt') == ['b']
    assert captions_of(as_json(caption='half \ud83d')) == ['half ?']
    for sample, reason in [({'png': b''}, 'no caption'), ({'txt': b'a', **as_json()}, 'no caption'),
                           ({'txt': b' '}, 'empty caption'), (as_json(captions=[]), 'empty caption')]:
        with pytest.raises(Skip, match=reason):
            captions_of(sample, 'title' if sample.get('txt') == b'a' else '')
    with pytest.raises(Skip):
        image_bytes({'__key__': 'k', 'txt': b'a'})


@pytest.mark.parametrize('mode', ['RGB', 'L', '1', 'P', 'RGBA', 'LA', 'CMYK', 'I;16'])
@pytest.mark.parametrize('shape', [(16, 16), (9, 40), (40, 9), (8, 8)])
def test_any_image_fits(mode, shape):
    file, repairs = io.BytesIO(), set()
    Image.new(mode, shape[::-1]).save(file, 'tiff' if mode == 'CMYK' else 'png')
    assert decode_image(file.getvalue(), 16, repairs=repairs).shape == (16, 16, 3)
    assert decode_image(file.getvalue(), 16, np.random.default_rng(0)).shape == (16, 16, 3)
    enlarged = {'image enlarged'} if min(shape) < 16 else set()
    assert repairs == enlarged | (set() if mode == 'RGB' else {f'image in {mode}'})


def test_strange_images_keep_their_colours():
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    assert (decode_image(saved(Image.fromarray(grey * 257)), 16) == grey[..., None]).all()   # 16 bits, not clipped
    clear = Image.new('RGBA', (16, 16), (0, 0, 0, 0))
    assert (decode_image(saved(clear), 16) == 255).all()                                     # white, not black
    half = Image.new('RGBA', (16, 16), (255, 0, 0, 128))
    assert (decode_image(saved(half), 16)[0, 0] == (255, 127, 127)).all()
    palette = Image.new('P', (16, 16))
    palette.putpalette([10, 20, 30])
    assert (decode_image(saved(palette), 16)[0, 0] == (10, 20, 30)).all()
    assert (decode_image(saved(palette, transparency=0), 16) == 255).all()
    ink = Image.new('CMYK', (16, 16), (0, 255, 255, 0))
    assert np.abs(decode_image(saved(ink, 'jpeg'), 16)[0, 0].astype(int) - (255, 0, 0)).max() < 3
    red, blue = Image.new('RGB', (16, 16), 'red'), Image.new('RGB', (16, 16), 'blue')
    for kind in ('gif', 'webp', 'png'):
        repairs = set()
        moving = saved(red, kind, save_all=True, append_images=[blue], **({'lossless': True} if kind == 'webp' else {}))
        assert (decode_image(moving, 16, repairs=repairs)[0, 0] == (255, 0, 0)).all()
        assert 'first image of several' in repairs


def test_photographs_are_turned_as_the_camera_was_held():
    exif = Image.Exif()
    exif[0x0112] = 6                                                             # a quarter turn
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 255
    turned = decode_image(saved(Image.fromarray(pixels), 'jpeg', exif=exif, quality=95), 16)
    assert (turned[:8] > 250).all() and (turned[8:] < 5).all()


def test_only_the_named_formats_are_opened():
    for strange in (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n', saved(Image.new('RGB', (16, 16)), 'ppm')):
        with pytest.raises(Skip):
            decode_image(strange, 16)


def test_pixels_round_as_the_released_evaluation_does():
    values = torch.tensor([-1., 0., .4999 / 255, .5001 / 255, 1., 2.])
    assert to_pixels(values.view(1, 1, 1, -1).expand(1, 3, 1, -1))[0, 0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]
    pixels = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    assert (to_pixels(to_images(pixels)) == pixels).all()


ok = image(32, 32)


def damage(tmp_path):
    "Shards with a fault each: name -> what is counted, how many samples are left"
    samples = [{'png': ok, 'txt': b'a'}] * 6
    whole = Path(write(tmp_path / 'whole.tar', samples)).read_bytes()
    member = 512 + (len(ok) + 511) // 512 * 512 + 1024                           # png and txt of a sample, with headers
    contents = {
        'empty': (b'', 'shard: empty', 0), 'no members': (bytes(10240), 'shard: empty', 0),
        'letter': (b'Dear Sir or Madam, ' * 500, 'shard: broken', 0),
        'cut in a file': (whole[:member * 3 + 700], 'shard: broken', 2),
        'cut in a header': (whole[:member * 3 + 100], 'shard: broken', 2),
        'cut between files': (whole[:member * 3], 'shard: broken', 2),
        'noise inside': (whole[:member * 2] + b'\xff' * 512 + whole[member * 2 + 512:], 'shard: broken', 1),
        'gz cut': (gzip.compress(whole)[:3000], 'shard: broken', None)}
    for name, (content, *_) in contents.items():
        (tmp_path / f'{name}.tar').write_bytes(content)
    return {name: told for name, (_, *told) in contents.items()} | {'lost': ['shard: missing', 0]}


def test_damaged_shards_give_what_they_can_and_are_counted(tmp_path):
    for name, (reason, left) in damage(tmp_path).items():
        counts = Counter()
        read = list(read_shard(str(tmp_path / f'{name}.tar'), counts))
        assert counts == {reason: 1}, name
        assert left is None or len(read) == left, name
        assert all({'png', 'txt'} <= set(sample) for sample in read), name       # no half samples


def test_unsafe_names_are_left_out(tmp_path):
    with tarfile.open(tmp_path / '0.tar', 'w') as tar:
        for name in ('/etc/0.txt', '../1.txt', 'a/../../2.txt', '3.__facts__', 'fine/5.txt', 'fine/5.txt'):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b'a'))
        link = tarfile.TarInfo('6.txt')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
        tar.addfile(link)
    counts = Counter()
    assert [sample['__key__'] for sample in read_shard(str(tmp_path / '0.tar'), counts)] == ['fine/5']
    assert counts == {'file: unsafe name': 4, 'file: name used twice': 1}


# shards in memory

def test_a_small_shard_is_read_from_its_file_once(tmp_path, monkeypatch):
    (path,) = write_shards(tmp_path, 'train', 5)
    data._shard_cache.clear()
    passes, parse = [], data._parse_shard
    monkeypatch.setattr(data, '_parse_shard', lambda shard, faults: passes.append(shard) or parse(shard, faults))
    first, second = ([dict(sample) for sample in data.read_shard(str(path), Counter())] for _ in range(2))
    assert first == second and len(first) == 5 and passes == [str(path)]
    second[0]['txt'] = b'changed'
    assert [dict(sample) for sample in data.read_shard(str(path), Counter())] == first


def test_a_shard_that_changed_is_read_again(tmp_path):
    (path,) = write_shards(tmp_path / 'a', 'train', 3)
    (other,) = write_shards(tmp_path / 'b', 'train', 4)
    data._shard_cache.clear()
    assert len(list(data.read_shard(str(path), Counter()))) == 3
    path.write_bytes(other.read_bytes())
    assert len(list(data.read_shard(str(path), Counter()))) == 4


def test_faults_are_counted_in_every_pass_and_memory_is_bounded(tmp_path, monkeypatch):
    (path,) = write_shards(tmp_path / 'a', 'train', 3)
    broken = tmp_path / 'broken.tar'
    broken.write_bytes(path.read_bytes()[:9000])
    data._shard_cache.clear()
    counts = [Counter(), Counter()]
    found = [len(list(data.read_shard(str(broken), faults))) for faults in counts]
    assert counts[0] == counts[1] and counts[0]['shard: broken'] == 1 and found[0] == found[1]
    monkeypatch.setattr(data, '_SHARD_CACHE_BYTES', path.stat().st_size + 1)
    data._cache_shard(('x', path.stat().st_size, 0), [], Counter())
    data._cache_shard(('y', path.stat().st_size, 0), [], Counter())
    assert [key[0] for key in data._shard_cache] == ['y']
    data._shard_cache.clear()


def test_a_pass_that_is_broken_off_keeps_nothing(tmp_path):
    (path,) = write_shards(tmp_path, 'train', 5)
    data._shard_cache.clear()
    next(data.read_shard(str(path), Counter()))
    assert not data._shard_cache


def test_a_grid_shows_every_image_with_its_caption():
    images = [np.full((32, 32, 3), value, np.uint8) for value in (0, 100, 200)]
    grid = show_grid(images, columns=2, size=64)
    assert grid.size == (132, 132) and [grid.getpixel(at)[0] for at in ((10, 10), (74, 10), (10, 74), (74, 74))] == [0, 100, 200, 255]
    tensor = torch.stack([torch.full((3, 32, 32), value / 255) for value in (0, 100, 200)])
    assert show_grid(tensor, columns=2, size=64).tobytes() == grid.tobytes()
    named = np.asarray(show_grid(images, ['a long caption that has to be wrapped', 'b'], columns=3))
    assert named.shape == (128 + 3 * 16 + 6, 3 * 128 + 8, 3) and named[128:].min() < 100                # text below
    long = np.asarray(show_grid(images, ['word ' * 40], columns=3))
    assert long.shape[0] > named.shape[0] and long[-24:].min() < 100                  # to its last line
    with pytest.raises(ValueError):
        show_grid([])


def test_an_animation_has_a_frame_for_each_time(tmp_path):
    frames = [[np.full((32, 32, 3), value, np.uint8)] * 2 for value in (0, 100, 200)]
    save_animation(frames, tmp_path / 'a.gif', ['a', 'b'])
    with Image.open(tmp_path / 'a.gif') as moving:
        assert moving.n_frames == 3 and moving.size == (260, 150) and moving.info['loop'] == 0
    still = [frames[0]] * 3
    save_animation(still, tmp_path / 'a.gif', ['a', 'b'], times=[0., .5, 1.])
    with Image.open(tmp_path / 'a.gif') as moving:
        seen = []
        for i in range(moving.n_frames):
            moving.seek(i)
            seen.append(moving.convert('RGB').tobytes())
        assert len(set(seen)) == 3                                                    # the times are written
    with pytest.raises(ValueError):
        save_animation(still, tmp_path / 'b.gif', times=[0.])
    with pytest.raises(ValueError):
        save_animation(frames, tmp_path / 'a.mp4')
    with pytest.raises(ValueError):
        save_animation([[]], tmp_path / 'b.gif')
    assert [path.name for path in tmp_path.iterdir()] == ['a.gif']
