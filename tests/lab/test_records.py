"""Records, their checks and tables: what the chapter on results does not show."""
import json
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from flowtok import files
from flowtok.lab import records as results


@pytest.fixture
def run():
    data = files.data_identity('scenes', {'train': 3}, [b'a', 'b'])
    return results.record('Does it?', {'scale': 'tiny', 'out': Path('x')}, started=time.time() - 5, seed=1, data=data,
                          metrics={'all': torch.tensor(.5), 'loss': np.float32(2), 'path': np.arange(3), 'SPICE': None},
                          conditions={'scale': 'tiny', 'reduced': True, 'stand_ins': ['random_conv_features'], 'n': 5})


def test_the_module_needs_the_standard_library_alone():
    code = ('import sys; before = set(sys.modules); import flowtok.lab.records, flowtok.lab.notebooks; '
            'print(*{m.split(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names) - {"flowtok"})')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ''


def test_schema_and_record_have_the_same_fields():
    assert set(results._SCHEMA) == {field.name for field in fields(results.RunRecord)}


def test_numbers_of_any_library_become_plain(run):
    assert run.metrics == {'all': 0.5, 'loss': 2.0, 'path': [0, 1, 2], 'SPICE': None}
    assert run.parameters['out'] == 'x' and 5 <= run.wall_time < 60 and run.started.endswith('Z')
    assert run.label() == 'tiny, reduced, stand-in random_conv_features'


def test_a_record_survives_the_file(run, tmp_path):
    path = results.write_record(tmp_path, run)
    assert results.read_record(tmp_path) == results.read_record(path) == run
    assert [p.name for p in tmp_path.iterdir()] == ['result.json']


@pytest.mark.parametrize('field', list(results._SCHEMA))
def test_each_missing_field_is_named(run, field):
    values = asdict(run)
    del values[field]
    with pytest.raises(ValueError, match=f'{field!r}'):
        results._check_record(values)


@pytest.mark.parametrize('path, value, named', [
    (('conditions', 'reduced'), 'yes', 'reduced.*yes.*bool'),
    (('metrics', 'loss'), float('inf'), 'loss.*inf'),
    (('metrics', 'all'), [{'low': float('nan')}], 'low.*all.*nan'),
    (('metrics', 'fid'), -.5, 'fid.*-0.5'), (('metrics', 'rows'), [{'training seconds': -3}], 'seconds.*-3'),
    (('metrics', 'FID, stand-in features'), -1e-9, 'FID, stand-in'), (('data',), [], 'data.*dict'), (('extra',), 1, 'extra')])
def test_each_wrong_field_is_named(run, path, value, named):
    values = json.loads(json.dumps(asdict(run)))
    part = values
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    with pytest.raises(ValueError, match=named):
        results._check_record(values)


def test_a_wrong_record_replaces_nothing(run, tmp_path):
    results.write_record(tmp_path, run)
    wrong = results.RunRecord(**{**asdict(run), 'metrics': {'fid': float('nan')}})
    with pytest.raises(ValueError):
        results.write_record(tmp_path, wrong)
    assert results.read_record(tmp_path) == run


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    path = files.write_atomically(tmp_path / 'a', 'old')

    def fails(*paths):
        raise OSError('disk full')
    monkeypatch.setattr(files.os, 'replace', fails)
    with pytest.raises(OSError):
        files.write_atomically(path, 'new')
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def test_git_state_sees_commit_and_changes(tmp_path):
    def git(*words):
        subprocess.run(['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@b.c', *words],
                       check=True, capture_output=True)
    git('init')
    (tmp_path / 'code.py').write_text('1')
    git('add', '.')
    git('commit', '-m', 'first')
    (tmp_path / 'untracked').write_text('')
    state = results._git_state(tmp_path)
    assert len(state['commit']) == 40 and state['dirty'] is False
    (tmp_path / 'code.py').write_text('2')
    assert results._git_state(tmp_path) == {**state, 'dirty': True}


def test_the_repository_is_found_from_a_folder_within_and_through_broken_settings(tmp_path, monkeypatch):
    inner = tmp_path / 'nbs' / 'deep'
    inner.mkdir(parents=True)
    assert results.find_repository(inner) is None
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\nlib_name = flowtok\n')
    (tmp_path / 'nbs' / 'settings.ini').write_text('no section')
    assert results.find_repository(inner) == tmp_path
    monkeypatch.chdir(inner)
    assert results.repository_root() == tmp_path


def test_tables_keep_digits_in_csv_and_say_what_is_missing(tmp_path):
    rows = [{'a': 1 / 3, 'b': 'x|y'}, {'a': None, 'c': 123456.7}]
    assert results.write_table(rows, tmp_path / 't.md') == (
        '| a | b | c |\n| --- | --- | --- |\n| 0.3333 | x\\|y |  |\n| not available |  | 123,457 |\n')
    assert (tmp_path / 't.csv').read_text() == f'a,b,c\n{1 / 3!r},x|y,\nnot available,,123456.7\n'
    with pytest.raises(ValueError):
        results.write_table([], tmp_path / 't')
