"The rules of the house: exports, layers, notebooks, README and package agree with each other."
import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser

import navigation
import pytest
import results
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from readme import markdown, root

nbs = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
packages = 'config files flow models losses data training pipeline pretrained evaluation toy lab demo cli __init__'.split()  # each imports those before it


def cells(path, kind='code'):
    return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]


def source(cell): return ''.join(cell['source'])


def exported(path):
    "The modules that a notebook exports"
    return [m[1] for c in cells(path) if (m := re.search(r'(?m)^#\|\s*default_exp\s+([\w.]+)', source(c)))]


def ident(path): return path.relative_to(root/'nbs').with_suffix('').as_posix()


chapters = [p for p in nbs if exported(p)]
run_notebooks = [p for p in nbs if p not in chapters and p.stem != 'index']
module = {p: exported(p)[0] for p in chapters}
order = {m: (packages.index(m.split('.')[0]), p.stem) for p, m in module.items()}  # of packages, then of the numbers inside one


def run(*command, **kwargs):
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}  # nbdev_export does nothing inside nbdev_test
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def copy(tmp_path):
    "What nbdev reads, in a folder of its own"
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(root/name, tmp_path)
    for p in nbs:
        to = tmp_path/p.relative_to(root)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, to)
    return tmp_path


def contents(folder, pattern):
    return {p.relative_to(folder).as_posix(): p.read_text(encoding='utf-8') for p in folder.glob(pattern)}


# modules ---------------------------------------------------------------------------------------------------

def test_modules_are_what_the_chapters_export(copy):
    run('-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()', cwd=copy)
    ours, exported = contents(root/'flowtok', '**/*.py'), contents(copy/'flowtok', '**/*.py')
    assert sorted(ours) == sorted(exported)
    changed = [name for name in ours if ours[name] != exported[name]]
    assert not changed, f'{changed} are not what nbdev_export writes: edit the notebook and export again'
    assert contents(root, 'pyproject.toml') == contents(copy, 'pyproject.toml')


def test_pyflakes_finds_nothing(): run('-m', 'pyflakes', str(root/'flowtok'))


def test_exported_lines_are_at_most_120_columns_wide():
    "But for the lists of names, which nbdev_export wraps."
    for path in (root/'flowtok').rglob('*.py'):
        if path.name == '_modidx.py': continue
        lines = path.read_text(encoding='utf-8')
        lines = re.sub(r'(?s)\n__all__ = \[.*?\]\n', '\n', lines).splitlines()
        assert not [line for line in lines if len(line) > 120], path


@pytest.mark.parametrize('path', chapters, ids=ident)
def test_chapters_import_what_comes_before_them(path):
    "Modules; the cells of a lesson may use the drawn scenes, too."
    own = module[path]
    tree = ast.parse((root/'flowtok'/f"{own.replace('.', '/')}.py").read_text(encoding='utf-8')) if own != '__init__' else ast.parse('')
    imports = {m for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for m in absolute(node, own)}
    wrong = {m for m in imports if m not in order or order[m] >= order[own]}
    assert not wrong, f'{ident(path)} imports {sorted(wrong)}: packages import in the order {", ".join(packages)}, chapters of one package in that of their numbers'
    side = {m for m in imports if m.split('.')[0] in ('toy', 'lab')}
    if own.split('.')[0] in ('toy', 'lab'): return
    assert not side or own in ('cli', 'demo'), f'{own} imports {sorted(side)}'
    at_import = {m for node in tree.body if isinstance(node, ast.ImportFrom) for m in absolute(node, own)}
    assert not side & at_import, f'{own} imports {sorted(side)} outside of a function'


def absolute(node, own):
    "Modules of flowtok that a from-import names, relative ones resolved."
    base = own.split('.')[:-1] if node.level == 1 else []
    if node.level: parts = [*base, *(node.module or '').split('.')] if node.level <= 2 else []
    elif (node.module or '').split('.')[0] == 'flowtok': parts = node.module.split('.')[1:]
    else: return []
    parts = [p for p in parts if p]
    names = ['.'.join([*parts, a.name]) for a in node.names]
    return ['.'.join(parts)] if '.'.join(parts) in order else [n for n in names if n in order] or ['.'.join(parts)]


@pytest.mark.parametrize('path', chapters, ids=ident)
def test_chapters_and_modules_have_the_same_place(path):
    assert len(exported(path)) == 1
    package, name = path.parent.relative_to(root/'nbs').parts, path.stem
    if package: number, name = name.split('_', 1); assert re.fullmatch(r'\d\d', number)
    assert '.'.join([*package, {'api': '__init__'}.get(name, name)]) == module[path]
    assert not [p for p in path.parent.glob(f'{path.stem[:3]}*.ipynb') if package and p != path], 'two chapters have one number'


# light imports ---------------------------------------------------------------------------------------------

light_import = '''
import sys

class Closed:
    "Refuses every module that is not on the list, as a machine without it would"
    def find_spec(self, name, path=None, target=None):
        top = name.split('.')[0]
        if top not in allowed: raise ModuleNotFoundError(f'No module named {name!r}', name=name)

allowed = set(sys.argv[1].split(',')) | set(sys.stdlib_module_names)
sys.meta_path.insert(0, Closed())
for name in sys.argv[2].split(','): __import__(name)
print(','.join(sorted({m.split('.')[0] for m in sys.modules})))
'''


def needed_by(*names):
    "Import names of the installed distributions that `names` need, themselves included"
    seen, todo, tops = set(), [canonicalize_name(n) for n in names], set()
    while todo:
        name = todo.pop()
        if name in seen: continue
        seen.add(name)
        try: held = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError: continue
        needs = [Requirement(line) for line in held.requires or []]
        todo += [canonicalize_name(r.name) for r in needs if r.marker is None or r.marker.evaluate({'extra': ''})]
        tops |= {file.parts[0].split('.')[0] for file in held.files or []}
    return tops


def import_with(packages, modules):
    return run('-c', light_import, ','.join({'flowtok', *packages}), ','.join(modules), cwd=root).strip().split(',')


def test_networks_need_torch_alone():
    light = [f'flowtok.{m}' for m in order if m.split('.')[0] in ('config', 'files', 'flow', 'models', 'losses')]
    import_with(needed_by('torch', 'numpy'), ['flowtok', *light])


def test_sizes_need_nothing(): assert 'torch' not in import_with([], ['flowtok', 'flowtok.config'])


# notebooks -------------------------------------------------------------------------------------------------

def test_notebooks_are_clean(copy):
    run('-c', 'from nbdev.clean import nbdev_clean; nbdev_clean()', cwd=copy)
    unclean = [ident(p) for p in nbs if p.read_bytes() != (copy/p.relative_to(root)).read_bytes()]
    assert not unclean, f'run nbdev_clean: {unclean}'


@pytest.mark.parametrize('path', nbs, ids=ident)
def test_notebooks_are_fit_to_read(path):
    assert path.stat().st_size < 300_000, f'{path.name} has {path.stat().st_size} bytes'
    outputs = [o for c in cells(path) for o in c['outputs']]
    assert not [o for o in outputs if o['output_type'] == 'error']
    if path in chapters: assert not [o for o in outputs if o.get('name') == 'stderr'], 'noise on stderr'
    shown = [o.get('data', {}) for o in outputs]
    assert not [data for data in shown if 'Figure size' in ''.join(data.get('text/plain', '')) and not any(kind.startswith('image/') for kind in data)], 'a figure as text'
    assert not [o for o in outputs if re.search(r'step \d[^\n]* left[^\n]*\n?\Z', ''.join(o.get('text', '')))], 'a line of progress that was not the last'
    for o in outputs:  # an image's base64 may spell anything
        o['data'] = {kind: data for kind, data in o.get('data', {}).items() if not kind.startswith('image/')}
    text = json.dumps([outputs, [source(c) for kind in ('code', 'markdown') for c in cells(path, kind)]])
    text = re.sub(r'data:image/[a-z+]+;base64,[\w+/=]+', '', text)
    assert not re.findall(r'/(?:home|root|work|tmp|Users)/\S*', text)


METHOD = sorted(path for folder in ('flow', 'models', 'losses') for path in (root/'nbs'/folder).glob('0*.ipynb') if path.stem not in ('05_released', '06_fast'))


@pytest.mark.parametrize('path', METHOD, ids=ident)
def test_chapters_of_the_method_show_a_figure_early_and_more_words_than_code(path):
    "Lines as JupyterLab shows them, some 45 a screen; formulas count as a word."
    words, lines, shown, figure_at = 0, 0, 0, None
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        text = source(cell)
        if cell['cell_type'] == 'markdown':
            words += len(re.sub(r'\$\$?[^$]*\$\$?', 'x', text).split())
            shown += sum(1 + len(line) // 110 for line in text.splitlines())
            figure = '![' in text
        else:
            code = [] if '#| hide' in text else [line for line in text.splitlines() if line.strip() and not line.startswith('#|')]
            lines, shown = lines + len(code), shown + len(code)
            figure = any(kind.startswith('image/') for output in cell['outputs'] for kind in output.get('data', {}))
        if figure and figure_at is None:
            figure_at = shown
    assert figure_at is not None and figure_at <= 90, figure_at
    assert words >= 2.5 * lines, words / lines


def font_sizes(code):
    "The sizes in points that code gives to the text of its figures, where it gives numbers; those of PIL are pixels."
    code = '\n'.join(line for line in code.splitlines() if not line.startswith(('%', '!')))
    for node in ast.walk(ast.parse(code)):
        pairs = []
        if isinstance(node, ast.Call):
            pairs = [(k.arg, k.value) for k in node.keywords if k.arg in ('fontsize', 'labelsize', 'titlesize', 'font_size')]
            if getattr(node.func, 'attr', '') in ('set_size', 'set_fontsize'):
                pairs += [('set_size', value) for value in node.args]
        if isinstance(node, ast.Dict):
            pairs = [(k.value, v) for k, v in zip(node.keys, node.values) if isinstance(k, ast.Constant) and re.fullmatch(r'(font|axes|legend|[xy]tick)\.\w*size', str(k.value))]
        for name, value in pairs:
            if isinstance(value, ast.Constant) and isinstance(value.value, (int, float)):
                yield value.value * (.75 if name == 'font_size' else 1)


@pytest.mark.parametrize('path', nbs, ids=ident)
def test_text_in_figures_is_large_enough_to_read(path):
    assert list(font_sizes("ax.text(0, 0, 'x', fontsize=6)\nrc = {'font.size': 8}\ntext(font_size=12)")) == [6, 8, 9]
    small = [size for cell in cells(path, 'code') for size in font_sizes(source(cell)) if size < 9]
    assert not small, small


@pytest.mark.parametrize('path', nbs[::6], ids=ident)
def test_what_jupyterlab_saves_is_what_is_committed(path):
    "By the hook of nbdev_install_hooks: execution counts and the machine's metadata do not reach the file."
    from nbdev.clean import clean_jupyter
    committed = json.loads(path.read_text(encoding='utf-8'))
    saved = json.loads(path.read_text(encoding='utf-8'))
    saved['metadata'] = {'kernelspec': {'display_name': 'Python 3 (ipykernel)', 'language': 'python', 'name': 'python3'},
                         'language_info': {'name': 'python', 'version': '3.12.1', 'mimetype': 'text/x-python'}}
    for i, cell in enumerate(c for c in saved['cells'] if c['cell_type'] == 'code'):
        cell['execution_count'], cell['metadata'] = i, cell['metadata'] | {'execution': {'iopub.status.busy': '2026-01-01T00:00:00'}, 'trusted': True}
        for output in cell['outputs']:
            if 'execution_count' in output:
                output['execution_count'] = i
    clean_jupyter(path=str(path), model={'type': 'notebook', 'content': saved})
    assert saved == committed


@pytest.mark.parametrize('path', run_notebooks, ids=ident)
def test_run_notebooks_take_parameters(path):
    assert [c for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])], 'no cell tagged parameters'


@pytest.mark.parametrize('path', run_notebooks, ids=ident)
def test_papermill_lists_every_parameter(path):
    from papermill.inspection import inspect_notebook
    (cell,) = [c for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]
    names = [node.target.id for node in ast.parse(source(cell)).body if isinstance(node, ast.AnnAssign)]
    assert list(inspect_notebook(str(path))) == names


def test_map_of_the_book_names_every_chapter():
    text = markdown()
    missing = [ident(p) for p in chapters + run_notebooks if f'](nbs/{ident(p)}.ipynb)' not in text]
    assert not missing, f'nbs/index.ipynb does not link to {missing}'


def test_every_page_leads_to_the_one_before_the_index_and_the_next():
    book = navigation.order()
    assert set(book) == set(nbs), 'nbs/index.ipynb links to every page once'
    stale = [ident(page) for page in book[1:] if page.read_text(encoding='utf-8') != navigation.with_navigation(page, book)]
    assert not stale, f'run python tests/navigation.py: {stale}'
    links = [page.parent / target for page in nbs for c in cells(page, 'markdown') for target in re.findall(r'\]\((?![a-z]+:|#)([^)\s#]+)', source(c))]
    assert len(links) > 150 and not [link for link in links if not link.exists()]


def test_run_notebooks_open_with_what_their_records_say():
    stale = [name for name in results.RESULTS if (root / 'nbs' / f'{name}.ipynb').read_text(encoding='utf-8') != results.with_results(root / 'nbs' / f'{name}.ipynb')]
    assert not stale, f'run python tests/results.py: {stale}'
    assert navigation.INDEX.read_text(encoding='utf-8') == results.with_front(), 'run python tests/results.py'
    committed = {file.parent.relative_to(root / 'papers_results').as_posix() for file in (root / 'papers_results').rglob('result.json')}
    shown = {folder for records in results.RESULTS.values() for folder, *_ in records}
    seeds = {folder for folder in committed if any(folder.startswith(f'{one}/') for one in shown)}
    assert committed - shown - seeds - {folder for folder in committed if folder.startswith('runs/')} <= {'figures', 'speed_h200'}


def test_chapters_are_named_by_links():
    unlinked = [(ident(page), mention) for page in nbs for c in cells(page, 'markdown') for mention in re.findall(r'[Cc]hapters? \d+|[Nn]ext chapter(?!\])|[Cc]hapter before', source(c))]
    assert not unlinked


# README and package ----------------------------------------------------------------------------------------

def test_readme_is_the_index():
    assert (root/'README.md').read_text(encoding='utf-8') == markdown(), 'write it again: python tests/readme.py'


def test_readme_links_lead_somewhere():
    targets = re.findall(r'\]\((?![a-z]+:|#)([^)\s#]+)', markdown())
    assert not [t for t in targets if not (root/t).exists()]


def test_readme_has_two_commands_of_one_line():
    main, test = [block.strip() for block in re.findall(r'(?s)```bash\n(.*?)```', markdown())]
    assert '\n' not in main + test
    assert main.startswith('python3 -m venv .venv && ') and '/papermill nbs/quickstart.ipynb' in main
    assert test.startswith('python3 -m venv .venv && ') and 'nbdev_test' in test and test.endswith('-m pytest -q')


def test_python_of_the_readme_runs(tmp_path):
    blocks = re.findall(r'(?s)```python\n(.*?)```', markdown())
    assert blocks
    for block in blocks: assert run('-c', block, cwd=tmp_path).strip()
    assert (tmp_path/'star.png').exists()


def test_package_says_what_settings_say():
    settings = ConfigParser(delimiters=['='])
    settings.read(root/'settings.ini', encoding='utf-8')
    cfg, meta = settings['DEFAULT'], importlib.metadata.metadata('flowtok')
    assert meta['Version'] == cfg['version'] and meta['Summary'] == cfg['description']
    assert meta['Requires-Python'] == f'>={cfg["min_python"]}'
    stated = {str(Requirement(r)) for r in cfg['requirements'].split()}
    installed = {str(Requirement(r)) for r in importlib.metadata.requires('flowtok') if 'extra' not in r}
    assert stated == installed, 'settings.ini changed after the install: pip install -e . again'
    assert set(meta.get_all('Provides-Extra')) == {'dev', 'captions', 'real', 'hf', 'demo', 'docs', 'peers'}


def test_entry_points_lead_somewhere():
    points = importlib.metadata.distribution('flowtok').entry_points
    assert {'console_scripts', 'papermill.io', 'flowtok.pipelines'} == {p.group for p in points}
    for p in points: p.load()


# the public interface --------------------------------------------------------------------------------------

PUBLIC = 'FlowTokPipeline FlowTok ImageTokenizer TextProjector TextDecoder preset presets recipe sample load_flowtok load_tokenizer'.split()


def test_import_flowtok_is_light_and_lists_its_names():
    code = "import sys, flowtok; print(*dir(flowtok)); flowtok.preset; print('torch' in sys.modules, flowtok.__version__)"
    names, rest = run('-c', code, cwd=root).splitlines()
    assert {*PUBLIC, '__version__'} <= set(names.split()) and rest.startswith('False ')


@pytest.mark.parametrize('name', PUBLIC)
def test_every_public_name_is_what_its_module_defines(name):
    import flowtok
    assert name in flowtok.__all__ and getattr(flowtok, name) is getattr(flowtok, name)


def test_an_unknown_name_is_an_attribute_error():
    import flowtok
    with pytest.raises(AttributeError): flowtok.nothing
