"Data sets of Hugging Face, here a folder of parquet files made on the spot: to shards, and to a training."
import io
import json
import subprocess
import sys

import pytest
from PIL import Image

datasets = pytest.importorskip('datasets', reason="needs pip install 'flowtok[hf]'")

from flowtok.cli import main
from flowtok.data.convert import convert_dataset, _dataset_rows, local_data
from flowtok.data.images import captions_of, find_shards, read_samples


def png(i, size=(20, 16)):
    stream = io.BytesIO()
    Image.new('RGB', size, (10 * i % 256, 0, 0)).save(stream, 'PNG')
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    "Three files of ten rows: an image column, captions, and what else a row says."
    for k in range(3):
        rows = range(10 * k, 10 * k + 10)
        images = [None if i == 7 else {'bytes': b'<html>' if i == 3 else png(i), 'path': f'{i}.png'} for i in rows]
        texts = [[f'image {i}', f'number {i}'] if i != 5 else [] for i in rows]
        features = datasets.Features({'picture': datasets.Image(), 'words': datasets.Sequence(datasets.Value('string')), 'score': datasets.Value('float64')})
        table = datasets.Dataset.from_dict({'picture': images, 'words': texts, 'score': [i / 2 for i in rows]}, features=features)
        (tmp_path / 'set').mkdir(exist_ok=True)
        table.to_parquet(str(tmp_path / 'set' / f'{k}.parquet'))
    return tmp_path / 'set'


def test_a_data_set_becomes_shards(folder, tmp_path, capsys):
    main(['shards', 'hf', str(folder), str(tmp_path / 'out'), '--image-column', 'picture', '--caption-column', 'words', '--samples-per-shard', '8'])
    assert '27 of 30' in capsys.readouterr().out
    samples = list(read_samples(find_shards(tmp_path / 'out')))
    assert len(samples) == 27 and captions_of(samples[0]) == ['image 0', 'number 0'] and json.loads(samples[2]['json'])['score'] == 1
    assert samples[1]['png'] == png(1)                           # the bytes as they were
    counts = json.loads((tmp_path / 'out' / 'source.json').read_text())['counts']
    assert counts == {'kept': 27, 'unreadable image': 1, 'missing caption': 1, 'missing image': 1}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').glob('*.tar')}
    convert_dataset(str(folder), tmp_path / 'out', 'picture', 'words', samples_per_shard=8)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').glob('*.tar')} and len(before) == 4
    with pytest.raises(ValueError, match='out'):
        convert_dataset(str(folder), tmp_path / 'out', 'picture', 'words', samples_per_shard=9)


def test_rows_are_read_as_they_are_needed(folder):
    rows, columns = _dataset_rows(str(folder))
    assert columns == ['picture', 'words', 'score'] and next(rows)['picture']['bytes'] == png(0)


@pytest.mark.parametrize('arguments, named', [
    (dict(image_column='photo'), 'photo.*image.*picture'), (dict(image_column='picture', caption_column='text'), 'text.*words'), (dict(), 'picture'),
    (dict(image_column='picture', caption_column='words', fit='x'), 'fit'), (dict(image_column='picture', caption_column='words', limit=0), 'limit')])
def test_bad_requests_are_refused_before_anything_is_written(folder, tmp_path, arguments, named):
    with pytest.raises(ValueError, match=named):
        convert_dataset(str(folder), tmp_path / 'out', **arguments)
    assert not (tmp_path / 'out').exists()


def test_sets_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr('flowtok.data.convert.reachable', lambda: False)
    (tmp_path / 'empty').mkdir()
    for name in (str(tmp_path / 'empty'), 'nobody/nothing'):
        with pytest.raises(FileNotFoundError, match=name.split('/')[-1]):
            convert_dataset(name, tmp_path / 'out')
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'x.parquet').write_bytes(b'no parquet')
    with pytest.raises(ValueError, match='broken'):
        convert_dataset(str(tmp_path / 'broken'), tmp_path / 'out')


def test_training_takes_a_data_set_by_its_name(folder, tmp_path):
    shards = local_data(f'hf:{folder}', tmp_path / 'run', 'picture', 'words')
    assert len(list(read_samples(find_shards(shards)))) == 27 and local_data(f'hf:{folder}', tmp_path / 'run', 'picture', 'words') == shards
    assert local_data('scenes', tmp_path) == 'scenes'
    with pytest.raises(ValueError, match='hf:'):
        local_data('scenes', tmp_path, 'picture')
    subprocess.run([sys.executable, '-m', 'flowtok.cli', 'train', '--data', f'hf:{folder}', '--image-column', 'picture', '--caption-column', 'words', '--scale', 'smoke', '--stage', 'text',
                    '--out', str(tmp_path / 'trained'), '--steps', '2'], check=True, capture_output=True)
    assert (tmp_path / 'trained' / 'text.safetensors').exists()
