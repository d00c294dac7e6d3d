"Files: a folder lets one process in, whatever becomes of it."
import signal
import subprocess
import sys

import pytest

from flowtok.toy.shapes import write_shards
from flowtok.files import lock_folder
from flowtok.training.fit import train
from flowtok.training.tasks import plan

HOLD = 'import sys, time; from flowtok.files import lock_folder\nwith lock_folder(sys.argv[1]): print(flush=True); time.sleep(60)'


def test_a_folder_lets_one_process_in_and_forgets_a_killed_one(tmp_path):
    holder = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path / 'a')], stdout=subprocess.PIPE, text=True)
    try:
        holder.stdout.readline()
        with pytest.raises(OSError) as refused, lock_folder(tmp_path / 'a'):
            pass
        assert str(holder.pid) in str(refused.value)
        with lock_folder(tmp_path / 'b'):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with lock_folder(tmp_path / 'a') as folder, pytest.raises(OSError), lock_folder(folder):
        pass


def test_a_second_training_in_a_folder_changes_nothing(tmp_path):
    write_shards(tmp_path / 'shards', 'train', 64)
    run = plan('text', 'smoke', tmp_path / 'shards', tmp_path / 'out')
    with lock_folder(run.folder), pytest.raises(OSError):
        train(run)
    assert {file.name for file in run.folder.iterdir()} <= {'.lock', '.in-use-by'} and not run.weights.exists()
    train(run)
    assert run.weights.exists()


def test_a_hub_that_does_not_answer_is_known_in_a_moment(monkeypatch):
    import socket
    import time
    import urllib.request

    from huggingface_hub import constants

    from flowtok.files import reachable
    monkeypatch.setattr(urllib.request, 'getproxies', lambda: {})
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        server.listen()
        monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{server.getsockname()[1]}')
        assert reachable()
    began = time.monotonic()
    for endpoint in (constants.ENDPOINT, 'https://nowhere.invalid'):
        monkeypatch.setattr(constants, 'ENDPOINT', endpoint)
        assert not reachable()
    assert time.monotonic() - began < 5
    monkeypatch.setattr(urllib.request, 'getproxies', lambda: {'https': 'http://proxy:1'})
    assert reachable()
