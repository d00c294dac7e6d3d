"The book as a site: every page in it once, nothing hidden shown, no link or image missing."
import json
import subprocess
import sys
from pathlib import Path

import book
import pytest

import flowtok


def test_every_page_is_in_the_book_once(tmp_path):
    pages = [page for part in book.chapters().values() for page in part]
    assert len(pages) == len(set(pages)) > 40 and 'log' in pages and 'flow/01_path' in pages
    (tmp_path / 'new.ipynb').write_text('{}')
    with pytest.raises(ValueError):
        book.chapters(tmp_path)


def test_sources_hold_neither_hidden_cells_nor_directives(tmp_path):
    book.write_sources(tmp_path / 'out')
    for file in (tmp_path / 'out' / 'nbs').rglob('*.ipynb'):
        code = [''.join(cell['source']) for cell in json.loads(file.read_text())['cells'] if cell['cell_type'] == 'code']
        assert not any(line.startswith('#|') for source in code for line in source.splitlines()) and not any('nbdev_export()' in source for source in code)
    assert json.loads((tmp_path / 'out' / '_toc.yml').read_text())['root'] == 'nbs/index'


def test_every_public_name_is_on_a_page_with_its_docments():
    pages = book.api_pages()
    for name in flowtok.__all__:
        place = getattr(flowtok, name)
        if callable(place):
            page = pages['api/' + place.__module__.removeprefix('flowtok.')]
            assert f'`{name}`' in page, name
    assert '    num_inference_steps: int = 20  # at least 1' in pages['api/flow.solver'] and '`FlowTokPipeline.caption`' in pages['api/pipeline']
    assert '    depth: int = 12  # blocks' in pages['api/config']


@pytest.mark.skipif(not Path(sys.executable).with_name('jupyter-book').exists(), reason="needs pip install -e '.[docs]'")
def test_the_site_is_built_without_a_warning():
    done = subprocess.run([sys.executable, book.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (book.root / '_docs' / '_build' / 'html' / 'nbs' / 'index.html').exists()
