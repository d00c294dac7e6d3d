"""README.md from nbs/index.ipynb: `python tests/readme.py` writes it, tests/test_house.py compares."""
import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]


def _rebase(match):
    "A link relative to nbs/, made relative to the root"
    return f'{match[1]}{posixpath.normpath(posixpath.join("nbs", match[2]))}{match[3]}'


def markdown(
    path=root/'nbs'/'index.ipynb'  # the notebook; its images are links to files, not outputs
) -> str:  # the README's text
    "The notebook as Markdown, without hidden cells and nbdev's directives, its links seen from the root"
    nb = nbformat.read(path, as_version=4)
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide\b', c.source)]
    nb.metadata['language_info'] = {'name': 'python'}
    for c in nb.cells:
        if c.cell_type == 'code': c.source = re.sub(r'(?m)^#\|.*\n?', '', c.source)
        else: c.source = re.sub(r'(\]\()(?![a-z]+:|[#/])([^)\s]+)(\))', _rebase, c.source)
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get('outputs'): raise ValueError(f'{path.name} holds an image as an output; link to a file instead')
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__': (root/'README.md').write_text(markdown(), encoding='utf-8')
