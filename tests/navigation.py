"""Numbers of the chapters, and previous, index and next at the end of every notebook but the index: `python tests/navigation.py` writes them, tests/test_house.py compares."""
import json
import os
import re
from pathlib import Path

root = Path(__file__).resolve().parents[1]
INDEX = root / 'nbs' / 'index.ipynb'
MARK = 'navigation'  # id of the cell


def order() -> list[Path]:  # the index first, then the notebooks in the order of its links
    "Notebooks of the book in reading order: the first link to each from the index."
    text = '\n'.join(''.join(cell['source']) for cell in json.loads(INDEX.read_text(encoding='utf-8'))['cells'] if cell['cell_type'] == 'markdown')
    text = text[text.index('## Map of the book'):]
    links = dict.fromkeys(re.findall(r'\]\(([\w/]+\.ipynb)\)', text))
    return [INDEX, *(root / 'nbs' / link for link in links)]


def title(path: Path) -> str:
    "Heading of a notebook, without its number."
    heading = next(''.join(cell['source']) for cell in json.loads(path.read_text(encoding='utf-8'))['cells']).splitlines()[0]
    return re.sub(r'^# (\d+\. )?', '', heading)


def numbers(pages: list[Path]) -> dict[Path, int]:
    "Numbers of the chapters, in reading order; the index and the notebooks that papermill runs have none."
    chapters = [page for page in pages[1:] if not any('parameters' in cell['metadata'].get('tags', []) for cell in json.loads(page.read_text(encoding='utf-8'))['cells'])]
    return {page: i for i, page in enumerate(chapters, 1)}


def navigation(path: Path, pages: list[Path]) -> str:
    "Links of one page."
    def link(arrow, other, text=None):
        return f'[{arrow} {text or title(other)}]({os.path.relpath(other, path.parent)})'.replace('[ ', '[')
    i = pages.index(path)
    links = [link('←', pages[i - 1])] * (i > 1) + [link('', INDEX, 'Index')] * (i > 0) + ([link('→', pages[i + 1])] if i + 1 < len(pages) else [])
    return ' · '.join(links)


def with_cell(notebook: dict, ident: str, text: str, at: int) -> str:  # the notebook's text
    "A notebook with a generated Markdown cell at a place, in the stead of the one with its id."
    cells = [cell for cell in notebook['cells'] if cell.get('id') != ident]
    cells.insert(at, {'cell_type': 'markdown', 'id': ident, 'metadata': {}, 'source': text.splitlines(keepends=True)})
    return json.dumps(notebook | {'cells': cells}, indent=1, ensure_ascii=False, sort_keys=True) + '\n'


def with_navigation(path: Path, pages: list[Path]) -> str:  # the notebook's text
    "A notebook with its links in the last visible cell."
    notebook = json.loads(path.read_text(encoding='utf-8'))
    cells = [cell for cell in notebook['cells'] if cell.get('id') != MARK]
    number = numbers(pages).get(path)
    lines = ''.join(cells[0]['source']).splitlines(keepends=True)
    lines[0] = lines[0].replace(lines[0].rstrip('\n'), f'# {number}. {title(path)}' if number else f'# {title(path)}')
    cells[0]['source'] = lines
    at = len(cells) - (cells[-1]['cell_type'] == 'code' and 'nbdev_export()' in ''.join(cells[-1]['source']))
    return with_cell(notebook | {'cells': cells}, MARK, navigation(path, pages), at)


if __name__ == '__main__':
    book = order()
    for page in book[1:]:
        page.write_text(with_navigation(page, book), encoding='utf-8')
