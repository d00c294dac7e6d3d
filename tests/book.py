"""The book as a site: `pip install -e '.[docs]' && python tests/book.py` writes _docs/_build/html/nbs/index.html."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
PARTS = {
    'Start': ['one_page', 'quickstart', 'playground', 'train'], 'The flow': ['flow/*'], 'Models': ['config', 'models/*'], 'Losses': ['losses/*'], 'Data': ['data/*'], 'Training': ['training/*'],
    'Use': ['pipeline', 'pretrained', 'demo', 'cli'], 'Evaluation': ['evaluation/*'], 'Speed': ['speed/*'], 'Experiments': ['experiments/*'],
    'Behind it': ['api', 'files', 'promises', 'log']}


def chapters(
    folder=root / 'nbs'  # of the notebooks
) -> dict[str, list[str]]:  # part -> chapters, in the order of the book
    "Every page of the book, once."
    found = {part: [page for name in names for page in sorted(
        file.relative_to(folder).with_suffix('').as_posix() for ending in ('ipynb', 'md') for file in folder.glob(f'{name}.{ending}'))] for part, names in PARTS.items()}
    listed = ['index', *(page for pages in found.values() for page in pages)]
    there = {file.relative_to(folder).with_suffix('').as_posix() for ending in ('ipynb', 'md') for file in folder.rglob(f'*.{ending}') if '.ipynb_checkpoints' not in file.parts}
    if len(set(listed)) < len(listed) or set(listed) != there:
        raise ValueError(f'Pages that are in no part, or in two: {sorted(there ^ set(listed))}')
    return found


def readable(notebook: dict) -> dict:
    "A notebook without hidden cells and nbdev's directives."
    cells = [cell for cell in notebook['cells'] if not re.match(r'#\|\s*(hide|default_exp)\b', ''.join(cell['source']))]
    for cell in cells:
        if cell['cell_type'] == 'code':
            cell['source'] = re.sub(r'(?m)^#\|.*\n?', '', ''.join(cell['source']))
        else:                                                                    # the line below a title, as nbdev reads it
            cell['source'] = re.sub(r'\A(# .*\n\n)> (.*)', r'\1*\2*', ''.join(cell['source']))
    return notebook | {'cells': cells}


def write_sources(target: Path):
    "Copy notebooks, results and configuration to a folder that Jupyter Book builds."
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(root / 'nbs', target / 'nbs', ignore=shutil.ignore_patterns('.*'))
    shutil.copytree(root / 'papers_results', target / 'papers_results', ignore=shutil.ignore_patterns('runs', '.*'))
    for name in ('LICENSE', 'SECURITY.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'CITATION.cff'):
        shutil.copy(root / name, target)
    for file in (target / 'nbs').rglob('*.ipynb'):
        file.write_text(json.dumps(readable(json.loads(file.read_text()))))
    parts = [{'caption': part, 'chapters': [{'file': f'nbs/{page}'} for page in pages]} for part, pages in chapters().items()]
    results = sorted(file.relative_to(target).with_suffix('').as_posix() for file in (target / 'papers_results').rglob('*.md') if file.stem != 'README')
    for page in results:                                                         # tables have no title of their own
        file = target / f'{page}.md'
        if not (text := file.read_text()).startswith('# '):
            file.write_text(f"# {page.removeprefix('papers_results/').replace('/', ', ').replace('_', ' ')}\n\n{text}")
    parts.append({'caption': 'Results', 'chapters': [{'file': 'papers_results/README', 'sections': [{'file': page} for page in results]}]})
    parts.append({'caption': 'Project', 'chapters': [{'file': page} for page in ('CONTRIBUTING', 'CHANGELOG', 'SECURITY')]})
    (target / '_static').mkdir(exist_ok=True)
    (target / '_static' / 'narrow.css').write_text('td code { white-space: normal; overflow-wrap: anywhere; }\n')   # commands in tables, on a telephone
    (target / '_toc.yml').write_text(json.dumps({'format': 'jb-book', 'root': 'nbs/index', 'parts': parts}, indent=1))       # JSON is YAML
    (target / '_config.yml').write_text(json.dumps({
        'title': 'FlowTok', 'author': 'the flowtok contributors', 'copyright': '2026', 'only_build_toc_files': True, 'execute': {'execute_notebooks': 'off'},
        'parse': {'myst_enable_extensions': ['dollarmath', 'amsmath', 'colon_fence'], 'myst_url_schemes': ['http', 'https', 'mailto']},
        'sphinx': {'config': {'suppress_warnings': ['myst.header'],
                              'html_theme_options': {'navigation_with_keys': True}}}}, indent=1))


if __name__ == '__main__':
    target = root / '_docs'
    write_sources(target)
    command = [str(Path(sys.executable).with_name('jupyter-book')), 'build', str(target), '--warningiserror', '--keep-going']
    sys.exit(subprocess.run(command).returncode)
