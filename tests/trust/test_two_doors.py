"What one way into the library checks, its siblings check, too."
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from flowtok.data.convert import convert_images, folder_entries, _is_done, _stats_path
from flowtok.evaluation.benchmark import _image_preparation
from flowtok.data.images import decode_image, read_samples
from flowtok.files import lock_folder
from flowtok.pipeline import FlowTokPipeline, _read_image


@pytest.fixture
def turned(tmp_path):
    "An image that a camera held on its side, red on one half and blue on the other."
    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    pixels[:, :20, 0], pixels[:, 20:, 2] = 255, 255
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / 'turned.jpg', exif=exif, quality=95)
    return tmp_path / 'turned.jpg'


def test_an_image_is_upright_whichever_way_it_comes_in(turned):
    by_training = decode_image(turned.read_bytes(), 32)
    assert by_training[4, 16, 0] > 200 and by_training[28, 16, 2] > 200          # red above, blue below
    for given in (turned, str(turned), Image.open(turned)):
        assert np.array_equal(_read_image(given, 32), by_training)
    Image.open(turned).load()


@pytest.mark.parametrize('size', [(60_000, 1), (1, 60_000), (4, 4), (30_000, 9)])
def test_images_of_impossible_sizes_are_refused_whichever_way_they_come_in(size, tmp_path):
    image = Image.new('RGB', size)
    image.save(tmp_path / 'x.png')
    pipe = FlowTokPipeline.from_pretrained()
    for given in (image, tmp_path / 'x.png', np.asarray(image)):
        with pytest.raises(ValueError):
            pipe.caption(given)


def folder_of_images(folder, n=6):
    folder.mkdir()
    for i in range(n):
        Image.new('RGB', (32, 32), (40 * i, 0, 0)).save(folder / f'{i}.png')
        (folder / f'{i}.txt').write_text(f'image {i}')
    return folder_entries(folder)


def test_a_finished_shard_that_was_cut_off_is_made_again(tmp_path):
    entries = folder_of_images(tmp_path / 'images')

    def convert():
        return convert_images('mine', entries, tmp_path / 'images', tmp_path / 'out', samples_per_shard=3)
    convert()
    shards = sorted((tmp_path / 'out').glob('*.tar'))
    whole = [shard.read_bytes() for shard in shards]
    shards[0].write_bytes(whole[0][:2000])
    _stats_path(shards[1]).write_text('{"succ')
    assert not _is_done(shards[0]) and not _is_done(shards[1])
    convert()
    assert len(list(read_samples(map(str, shards), {}))) == 6 and all(map(_is_done, shards))
    assert json.loads(_stats_path(shards[1]).read_text())['successes'] == 3


def test_two_converters_do_not_share_a_folder(tmp_path):
    entries = folder_of_images(tmp_path / 'images')
    with lock_folder(tmp_path / 'out'), pytest.raises(OSError):
        convert_images('mine', entries, tmp_path / 'images', tmp_path / 'out')
    assert not list((tmp_path / 'out').glob('*.tar'))
    convert_images('mine', entries, tmp_path / 'images', tmp_path / 'out')
    shutil.rmtree(tmp_path / 'out')


def test_linked_folders_are_counted_and_not_followed(tmp_path):
    folder_of_images(tmp_path / 'elsewhere')
    folder_of_images(tmp_path / 'images')
    (tmp_path / 'images' / 'more').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'images' / 'loop').symlink_to(tmp_path / 'images')
    source = convert_images('mine', folder_entries(tmp_path / 'images'), tmp_path / 'images', tmp_path / 'out')
    assert source['counts'] == {'kept': 6, 'linked folder': 2}


def test_reference_images_of_two_formats_are_refused(tmp_path):
    files = [tmp_path / name for name in ('a.jpg', 'b.jpg', 'c.png')]
    for file in files:
        Image.new('RGB', (32, 32)).save(file)
    assert _image_preparation(files[:2], 16) == 'JPEG, centre crop, 16 pixels' and _image_preparation(files[2:]) == 'PNG, whole'
    with pytest.raises(ValueError, match='JPEG.*PNG'):
        _image_preparation(files, 16)
