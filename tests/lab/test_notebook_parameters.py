"""Parameters and folders of run notebooks, and the papermill plug-in on a real terminal and in pipes."""
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from papermill.cli import papermill

from flowtok.lab import notebooks as runs

CHECK = '''from flowtok.lab.notebooks import check_parameters, progress, run_folder
parameters = check_parameters(globals(), scale=('tiny', 'xl'))
folder = run_folder('train')
(folder / 'result.json').write_text(scale)
total = sum(progress(range(200)))'''


@pytest.fixture
def repository(tmp_path, monkeypatch):
    "A repository of the same name with one small run notebook, and a foreign notebook beside it."
    root = tmp_path / 'ours'
    (root / 'nbs').mkdir(parents=True)
    (root / 'settings.ini').write_text('[DEFAULT]\nlib_name = flowtok\n')
    cells = [new_code_cell("scale = 'tiny'  # model size", metadata={'tags': ['parameters']}), new_code_cell(CHECK)]
    notebook = new_notebook(cells=cells)
    notebook.metadata['kernelspec'] = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
    nbformat.write(notebook, root / 'nbs' / 'train.ipynb')
    (tmp_path / 'foreign').mkdir()
    nbformat.write(notebook, tmp_path / 'foreign' / 'train.ipynb')
    monkeypatch.chdir(root)
    monkeypatch.delenv(runs._RUN_FOLDER, raising=False)
    return root


def written(root):
    "The notebooks in the run folders."
    return sorted(root.glob('papers_results/runs/*/run.ipynb'))


def injected(path):
    "The cell of parameters that papermill added."
    tagged = (c.source for c in nbformat.read(path, 4).cells if 'injected-parameters' in c.metadata.get('tags', []))
    return next(tagged, None)


def on_terminal(*command):
    "Exit status and text of a command whose three streams are a terminal."
    pty = pytest.importorskip('pty')
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b''
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux says this way that the other side is closed
            break
        if not part:
            break
        text += part
    os.close(ours)
    return process.wait(), text.decode()


program = str(Path(sys.executable).with_name('papermill'))
prepare = ('--prepare-only', '-p', 'scale', 'xl')  # no kernel: the notebook is written with its parameters


def test_the_installed_package_brings_the_plug_in():
    entries = importlib.metadata.entry_points(group='papermill.io')
    assert 'flowtok.lab.notebooks:RunFolderHandler' in {entry.value for entry in entries if entry.name == 'flowtok://'}


def test_the_promised_command_runs_on_a_terminal(repository):
    status, text = on_terminal(program, 'nbs/train.ipynb', '-p', 'scale', 'xl')
    assert status == 0, text
    [path] = written(repository)
    assert "scale = \"xl\"" in injected(path) and path.parent.name.startswith('train-')
    assert (path.parent / 'result.json').read_text() == 'xl'  # the record lies beside the executed notebook
    outputs = nbformat.read(path, 4).cells[-1].outputs
    assert len(outputs) == 1 and '100%' in outputs[0].data['text/plain']  # one line of progress


def test_a_mistyped_parameter_ends_the_run(repository):
    status, text = on_terminal(program, 'nbs/train.ipynb', '-p', 'scael', 'xl')
    assert status == 1 and "unknown parameter 'scael', did you mean 'scale'?" in text
    assert not list(repository.glob('papers_results/runs/*/result.json'))


def test_python_m_papermill_from_another_folder(repository, monkeypatch):
    monkeypatch.chdir(repository.parent / 'foreign')
    status, text = on_terminal(sys.executable, '-m', 'papermill', *prepare, '../ours/nbs/train.ipynb')
    assert status == 0, text
    assert 'xl' in injected(written(repository)[0]) and not (repository.parent / 'foreign' / 'papers_results').exists()


def test_an_output_path_of_ones_own_is_kept(repository):
    assert on_terminal(program, 'nbs/train.ipynb', 'mine.ipynb', *prepare)[0] == 0
    assert 'xl' in injected('mine.ipynb') and not written(repository)


def test_a_foreign_notebook_still_wants_its_output_path(repository):
    status, text = on_terminal(program, '../foreign/train.ipynb', *prepare)
    assert status == 2 and "Missing argument 'OUTPUT_PATH'" in text and not (repository / 'papers_results').exists()


def test_help_is_left_alone(repository):
    status, text = on_terminal(program, '--help-notebook', 'nbs/train.ipynb')
    assert status == 0 and 'model size' in text and not (repository / 'papers_results').exists()


@pytest.mark.parametrize('stdin', [subprocess.DEVNULL, subprocess.PIPE], ids=['no input', 'piped input'])
def test_pipes_neither_print_nor_overwrite_the_notebook(repository, stdin):
    source = Path('nbs/train.ipynb').read_bytes()
    done = subprocess.Popen([program, 'nbs/train.ipynb', *prepare], stdin=stdin, stdout=subprocess.PIPE, text=True)
    text = done.communicate()[0]
    assert done.returncode == 0 and 'nbformat' not in text
    assert Path('nbs/train.ipynb').read_bytes() == source and 'xl' in injected(written(repository)[0])


@pytest.mark.parametrize('words', [['nbs/train.ipynb', '-'], ['../foreign/train.ipynb']], ids=['dash', 'foreign'])
def test_who_wants_the_notebook_printed_gets_it(repository, words):
    done = subprocess.run([program, *words, *prepare], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0 and nbformat.reads(done.stdout, 4).cells and not written(repository)


def test_results_that_cannot_be_written_are_said_at_once(repository):
    (repository / 'papers_results').write_text('in the way')
    status, text = on_terminal(program, 'nbs/train.ipynb')
    assert status == 1 and 'cannot be written' in text and 'Traceback' not in text


@pytest.mark.parametrize('words', [
    ['nbs/train.ipynb'], ['-p', 'scale', 'xl', 'nbs/train.ipynb'], ['nbs/train.ipynb', '-pscale', 'xl', '-ra', 'b'],
    ['--cwd=nbs', '-f', 'x.yaml', '--', 'nbs/train.ipynb'], ['-k', 'python3', '--no-progress-bar', 'nbs/train.ipynb']])
def test_every_way_to_write_options_leaves_one_notebook(repository, words):
    call = runs._parse_papermill(papermill, words)
    assert (call.notebook, call.output) == ('nbs/train.ipynb', '')
    assert runs._with_run_folder(papermill, words)[:-1] == words


@pytest.fixture
def resumable(repository):
    "The same repository with a notebook that can resume."
    cells = [new_code_cell("scale = 'tiny'\nresume = 'auto'  # or never\nout = ''", metadata={'tags': ['parameters']})]
    nbformat.write(new_notebook(cells=cells), 'nbs/train.ipynb')
    return repository


def folder_of(*words):
    return Path(runs._with_run_folder(papermill, ['nbs/train.ipynb', *words])[-1]).parent


def test_the_same_line_typed_again_goes_on_in_its_folder(resumable):
    first = folder_of('-p', 'scale', 'xl', '-p', 'data', '/data/a b')
    (first / 'run.ipynb').write_text('of the first time')
    assert folder_of('-p', 'data', '/data/a b', '-r', 'scale', 'xl', '-p', 'resume', 'never') == first
    assert not (first / 'run.ipynb').exists() and [file.read_text() for file in first.glob('run-*.ipynb')] == ['of the first time']
    assert len({first, folder_of('-p', 'scale', 'xl'), folder_of('-p', 'scale', 'h'), folder_of('-p', 'scale', 'xl', '-p', 'data', '/data/a_b')}) == 4
    assert len({folder_of('-y', 'scale: xl'), folder_of('-y', 'scale: h'), folder_of(), folder_of()}) == 4


def test_a_folder_asked_for_holds_the_notebook_too(resumable, tmp_path):
    assert folder_of('-p', 'out', 'mine').resolve() == resumable / 'mine'
    assert folder_of('-p', 'scale', 'xl', '-p', 'out', str(tmp_path / 'there')).resolve() == tmp_path / 'there'


@pytest.mark.parametrize('words', [
    ['-p', 'nbs/train.ipynb', 'x'], ['--version', 'nbs/train.ipynb'], ['nbs/train.ipynb', '-p', 'scale'], ['-h'],
    ['s3://nbs/train.ipynb'], ['nbs'], ['settings.ini'], ['nbs/train.ipynb', 'a', 'b']])
def test_every_other_call_is_left_to_papermill(repository, words):
    assert runs._with_run_folder(papermill, words) is None and not (repository / 'papers_results').exists()


def test_a_relative_folder_counts_from_the_root(repository, monkeypatch):
    monkeypatch.chdir('nbs')
    assert runs.run_folder('train', out='mine') == repository / 'mine'
    assert runs.run_folder('train').parent == repository / 'papers_results' / 'runs'


def test_the_folder_check_leaves_nothing_behind(tmp_path):
    assert not list(runs._check_output_folder(tmp_path / 'a' / 'b').iterdir())


def test_parameters_that_papermill_adds_itself_are_known():
    namespace = {'steps': 3, 'PAPERMILL_OUTPUT_PATH': 'x', 'In': [], 'Out': {}, 'exit': object()}
    assert runs.check_parameters(namespace, steps=int) == {'steps': 3}


@pytest.mark.parametrize('value, good, right', [
    (1, int, True), (1.0, int, False), (True, int, False), (1, float, True), ('1', float, False), (1, bool, False),
    (1, (True, False), False), (None, ('a', None), True), ('', str, True), (0, runs.Between(0, 5), True),
    (0.5, runs.Between(0, 1.), True), (2, runs.Between(0, 1.), False)])
def test_values_are_judged_by_type_and_range(value, good, right):
    assert runs._is_good(value, good) is right
