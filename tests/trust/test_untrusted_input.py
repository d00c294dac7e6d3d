"What data, archives and folders declare is not trusted: nothing runs, nothing is read elsewhere, nothing stalls."
import json
import os
import tarfile
import time
from collections import Counter

import pytest
from made import write

from flowtok.data.images import _MAX_SHARDS, find_shards, read_samples, read_shard
from flowtok.data.mixture import find_sources
from flowtok.training.tasks import plan


def cache(folder, shards):
    "A folder that says of itself that it is a token cache."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'cache.json').write_text(json.dumps({'tokenizer': 'x', 'size': 64, 'data': 'y', 'sources': [{'shards': shards}]}))
    return folder


@pytest.mark.parametrize('shards', [
    'pipe:touch {there}; cat {tar}', 'PIPE:touch {there}', 'https://example.org/0.tar', 'hf://datasets/a/b.tar', '../elsewhere/0.tar', '{tar}', 'a/../../elsewhere/*.tar'])
def test_a_folder_names_no_command_and_no_place_elsewhere(tmp_path, shards):
    write(tmp_path / 'elsewhere' / '0.tar', [{'txt': b'a'}])
    names = shards.replace('{there}', str(tmp_path / 'ran')).replace('{tar}', str(tmp_path / 'elsewhere' / '0.tar'))
    folder = cache(tmp_path / 'data', names)
    for door in (find_sources, lambda data: plan('text', 'smoke', data, tmp_path / 'out')):
        with pytest.raises(ValueError):
            find_sources(folder)
    assert not (tmp_path / 'ran').exists()


def test_a_list_that_the_user_names_may_lie_elsewhere_but_runs_nothing(tmp_path):
    write(tmp_path / 'elsewhere' / '0.tar', [{'txt': b'a'}])
    (tmp_path / 'lists').mkdir()
    mine = tmp_path / 'lists' / 'mine.json'
    mine.write_text(json.dumps([{'shards': '../elsewhere'}, {'shards': str(tmp_path / 'elsewhere' / '0.tar')}]))
    assert len(find_sources(mine)) == 2
    mine.write_text(json.dumps([{'shards': f'pipe:touch {tmp_path}/ran'}]))
    with pytest.raises(ValueError):
        find_sources(mine)
    assert not (tmp_path / 'ran').exists()


def test_a_file_that_is_called_like_a_command_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'a.tar', [{'txt': b'a'}])
    os.rename('a.tar', 'pipe:touch ran;.tar')
    for data in ('*.tar', '.', '[p]*.tar'):
        shards, faults = find_shards(data), Counter()
        assert [sample['txt'] for shard in shards for sample in read_shard(shard, faults)] == [b'a'] and not faults
    assert not os.path.exists('ran')


def test_a_pipe_a_folder_and_a_member_of_64_gigabytes_end_at_once(tmp_path):
    os.mkfifo(tmp_path / 'fifo.tar')
    (tmp_path / 'folder.tar').mkdir()
    header = tarfile.TarInfo('big.txt')
    header.size = 2**36
    with open(tmp_path / 'big.tar', 'wb') as file:
        file.write(header.tobuf())
        file.truncate(2**36 + 1024)                                              # takes no room: the file is full of holes
    write(tmp_path / 'good.tar', [{'txt': b'a'}])
    began, faults = time.monotonic(), Counter()
    assert [sample['txt'] for sample in read_samples(find_shards(tmp_path), faults)] == [b'a']
    assert time.monotonic() - began < 10 and faults == {'shard: not a file': 2, 'shard: broken': 1}


def test_a_hundred_million_shards_are_refused_at_once():
    began = time.monotonic()
    with pytest.raises(ValueError):
        find_shards('shards/{000000000..100000000}.tar')
    assert time.monotonic() - began < 30 and _MAX_SHARDS >= 100_000
