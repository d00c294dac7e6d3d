"""Shards, batches and the token cache: what 08_data promises and its lessons do not show."""
import io
import json

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from flowtok.data import (captions_of, decode_image, find_shards, image_bytes, read_moments, read_samples,
                          to_images, to_pixels, write_token_cache)


def png(height, width, seed=0, mode='RGB'):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, 'png')
    return file.getvalue()


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        with wds.TarWriter(str(tmp_path / f'{shard:05d}.tar')) as sink:
            for i in range(10):
                key = shard * 10 + i
                sink.write({'__key__': f'{key:09d}', 'png': png(16, 16, key), 'txt': f'number {key}'.encode()})
    return find_shards(tmp_path)


def test_processes_share_an_ordered_reading(shards):
    seen = [sample['__key__'] for rank in range(2) for sample in read_samples(shards, shuffle=0, rank=rank, world_size=2)]
    assert sorted(seen) == [f'{i:09d}' for i in range(30)]


def test_shuffled_reading_repeats_and_differs(shards):
    def keys(**how):
        return [sample['__key__'] for _, sample in zip(range(60), read_samples(shards, shuffle=8, **how))]
    assert keys(seed=1) == keys(seed=1)
    assert keys(seed=1) != keys(seed=2) and keys(seed=1) != keys(seed=1, rank=1)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'P', 'RGBA', 'CMYK'])
@pytest.mark.parametrize('shape', [(16, 16), (9, 40), (40, 9), (7, 8)])
def test_any_picture_fits(mode, shape):
    file = io.BytesIO()
    Image.new(mode, shape[::-1]).save(file, 'tiff' if mode == 'CMYK' else 'png')
    assert decode_image(file.getvalue(), 16).shape == (16, 16, 3)
    assert decode_image(file.getvalue(), 16, np.random.default_rng(0)).shape == (16, 16, 3)


def test_pixels_round_as_the_released_evaluation_does():
    values = torch.tensor([-1., 0., .4999 / 255, .5001 / 255, 1., 2.])
    assert to_pixels(values.view(1, 1, 1, -1).expand(1, 3, 1, -1))[0, 0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]
    pixels = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    assert (to_pixels(to_images(pixels)) == pixels).all()


def test_sample_without_image_or_caption_is_named(shards):
    with pytest.raises(ValueError, match='k holds no image'):
        image_bytes({'__key__': 'k', 'txt': b'a'})
    with pytest.raises(ValueError, match='k holds no caption'):
        captions_of({'__key__': 'k', 'png': b''})
    assert captions_of({'json': json.dumps({'caption': 'a'}).encode()}) == ['a']


def test_token_cache_round_trip_and_reuse(shards, tmp_path):
    def encode(pixels):
        return pixels.reshape(len(pixels), 8, -1)[:, :, :6] / 255.
    folder = write_token_cache(read_samples(shards, shuffle=0), encode, tmp_path / 'cache', 16, batch_size=7)
    first = next(read_samples(find_shards(folder), shuffle=0))
    pixels = decode_image(next(read_samples(shards, shuffle=0))['png'], 16)
    assert len(first['token.npy']) == 2 * 8 * 6
    assert np.abs(read_moments(first, 3) - encode(pixels[None])[0]).max() < 1e-3
    def never(pixels):
        raise AssertionError('a finished cache was written again')
    write_token_cache(read_samples(shards, shuffle=0), never, folder, 16)

