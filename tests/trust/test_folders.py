"A folder holds the old files or the new ones, whenever the process that writes them ends."
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from flowtok import files
from flowtok.files import _PENDING_RENAMES, current_file, replace_files
from flowtok.pipeline import FlowTokPipeline


@pytest.fixture(scope='module')
def pipes():
    "Two pipelines that differ in every part."
    first, second = FlowTokPipeline.from_pretrained(), FlowTokPipeline.from_pretrained()
    for p in second.parameters():
        p.data.mul_(1.5)
    second.config = replace(second.config, name='second')
    return first, second


def weights_of(part):
    return {name: p.cpu() for name, p in part.named_parameters() if not name.startswith(('alignment', 'temperature'))}      # those of training alone are not saved


def same(folder, pipe):
    "Whether the folder loads and is this pipeline; it may not be a mixture."
    loaded = FlowTokPipeline.from_pretrained(folder)
    assert loaded.parts.keys() == pipe.parts.keys()
    equal = {all(torch.allclose(x, weights_of(pipe.parts[stage])[name], rtol=1e-2, atol=1e-3) for name, x in weights_of(loaded.parts[stage]).items()) for stage in pipe.parts}
    equal |= {loaded.config.name == pipe.config.name}
    assert len(equal) == 1
    return equal == {True}


class Killed(BaseException):
    "Stands for the end of the process: nothing after it runs."


@pytest.mark.parametrize('at', range(12))
def test_a_save_that_is_killed_at_any_rename_leaves_one_whole_pipeline(pipes, tmp_path, monkeypatch, at):
    first, second = pipes
    first.save_pretrained(tmp_path)
    calls, real = [], os.replace

    def rename(old, new):
        calls.append(new)
        if len(calls) > at:
            raise Killed
        real(old, new)
    monkeypatch.setattr(os, 'replace', rename)
    monkeypatch.setattr(files.Path, 'unlink', lambda *given, **named: None)      # a killed process cleans nothing up
    try:
        second.save_pretrained(tmp_path)
    except Killed:
        pass
    monkeypatch.undo()
    assert same(tmp_path, first) != same(tmp_path, second)
    second.save_pretrained(tmp_path)
    assert same(tmp_path, second) and not (tmp_path / _PENDING_RENAMES).exists()


def test_a_save_that_is_really_killed(pipes, tmp_path):
    pipes[0].save_pretrained(tmp_path / 'out')
    code = ("import sys; from flowtok.pipeline import FlowTokPipeline\npipe = FlowTokPipeline.from_pretrained()\n"
            "for p in pipe.parameters(): p.data.mul_(1.5)\nprint(flush=True)\nwhile True: pipe.save_pretrained(sys.argv[1])")
    for wait in (.01, .05, .1, .2):
        saver = subprocess.Popen([sys.executable, '-c', code, str(tmp_path / 'out')], stdout=subprocess.PIPE, text=True)
        saver.stdout.readline()
        time.sleep(wait)
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        FlowTokPipeline.from_pretrained(tmp_path / 'out')


def test_a_disk_that_fills_midway_changes_nothing(pipes, tmp_path, monkeypatch):
    first, second = pipes
    first.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob('*.*') if not path.name.startswith('.')}
    monkeypatch.setattr(os, 'fsync', lambda descriptor: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(OSError):
        second.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob('*.*') if not path.name.startswith('.')} == before
    assert not list(tmp_path.glob('.*.part'))


def test_parts_of_two_pipelines_are_not_mixed(pipes, tmp_path):
    first, second = pipes
    first.save_pretrained(tmp_path)
    with pytest.raises(ValueError):
        second.save_pretrained(tmp_path, ['tokenizer', 'text-to-image'])
    assert same(tmp_path, first)
    first.save_pretrained(tmp_path, ['tokenizer'])                               # what stays is its own
    assert same(tmp_path, first)
    second.save_pretrained(tmp_path)
    assert same(tmp_path, second)


def test_pending_renames_lead_nowhere_else(tmp_path):
    with replace_files(tmp_path / 'a') as part:
        part('x').write_text('mine')
    (tmp_path / 'secret.part').write_text('not to be read')
    (tmp_path / 'a' / _PENDING_RENAMES).write_text('{"x": "../secret.part"}')
    assert current_file(tmp_path / 'a', 'x').read_text() == 'mine'
    for content in ('', '[]', '{"x": 3}', '{"x": "gone.part"}'):
        (tmp_path / 'a' / _PENDING_RENAMES).write_text(content)
        assert current_file(tmp_path / 'a', 'x').read_text() == 'mine'
        with replace_files(tmp_path / 'a') as part:                              # what is no list of renames blocks nobody
            part('x').write_text('mine')


def test_a_read_only_folder_loads(pipes, tmp_path):
    pipes[0].save_pretrained(tmp_path / 'out')
    (tmp_path / 'out').chmod(0o555)
    try:
        assert FlowTokPipeline.from_pretrained(tmp_path / 'out').parts
    finally:
        (tmp_path / 'out').chmod(0o755)
        shutil.rmtree(tmp_path / 'out')
