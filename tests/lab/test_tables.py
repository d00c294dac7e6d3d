"Tables, their records and the paper's values: nothing stands in a committed table that nobody measured."
import csv
import json
import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from readme import root

from flowtok.lab import paper
from flowtok.lab import tables
from flowtok.config import paper_recipes, presets
from flowtok.files import data_identity
from flowtok.lab.records import read_record, record, write_record, write_table

folder = root / 'papers_results'
committed = tables.find_records(folder)
written = ['table_1', 'table_2', 'table_3', 'table_4', 'table_5', 'table_6', 'figure_2', 'measured']
definitions = 'table_1', 'table_5', 'table_6'


def of(question, metrics, reduced=True, stand_ins=('random_conv_features',), seed=0, **more):
    return record(question, {}, started=time.time(), seed=seed, data=data_identity('drawn', {'n': 3}, ['a']), metrics=metrics,
                  conditions={'scale': 'tiny', 'reduced': reduced, 'stand_ins': list(stand_ins), **more})


def of_coco(**more):
    fid = {'clean': {'fid': 12.345678, 'low': 11.0, 'high': 13.5}}
    clip = {'model': '', 'mean': None, 'low': None, 'high': None, 'why': 'needs weights'}
    return of(tables.QUESTIONS['benchmark_coco'], {'method': 'FlowTok-XL', 'n': 77, 'fid': fid, 'clip_score': clip}, **more)


# the paper's values ----------------------------------------------------------------------------------------

def test_the_paper_names_every_method():
    assert list(paper.TABLE_2) == ['GLIDE', 'DALL-E 2', 'LlamaGen', 'PixArt-alpha', 'SDXL', 'LDM', 'Stable Diffusion 1.5',
                                   'Stable Diffusion 2.1', 'Show-o', 'CrossFlow', 'FlowTok-XL', 'FlowTok-H']
    assert list(paper.TABLE_3) == ['CrossFlow', 'FlowTok-XL', 'MNIC', 'MIR', 'NAIC-CMAL', 'SATIC', 'SCD-Net']
    assert len(paper.TABLE_4) == 6 and len(paper.TABLE_5) == 9 and len(paper.TABLE_1) == 3
    assert 'ROUGE-L' not in paper.TABLE_3['MIR'] and 'images/s' not in paper.TABLE_2['SDXL']


def test_the_presets_are_the_papers():
    for row in tables._table_1():
        assert all(row[f'{name} (paper)'] == row[f'{name} (preset)'] for name in ('depth', 'width', 'mlp', 'heads'))
        counted, quoted = int(row['params (preset)'].replace(',', '')), row['params (paper)']
        assert counted == pytest.approx(float(quoted[:-1]) * {'M': 1e6, 'B': 1e9}[quoted[-1]], rel=0.05)
    assert all(row['the same'] == 'yes' for row in tables._table_6())
    for row, wanted in zip(tables._table_5(), paper.TABLE_5.values(), strict=True):
        score, side = row['aesthetic score above'], row['longer side at least']
        assert row['data set'] == wanted['data set'] and wanted['aesthetic'] == (f'> {score:.1f}' if score else '')
        assert bool(side) == (wanted['resolution'] == 'yes') and bool(row['watermark at most']) == (wanted['watermark'] == 'yes')


@pytest.mark.parametrize('table', ['table 2', 'table 3', 'table 4'])
def test_every_value_has_its_source(table):
    for method, row in paper._TABLES[table].items():
        for column, value in row.items():
            assert paper.paper_value(table, method, column) == {'value': value, 'measure': column, 'method': method, 'source': paper.SOURCES[table]}


# labels ----------------------------------------------------------------------------------------------------

def test_a_reduced_number_is_never_without_its_label():
    run = of_coco(steps=20)
    rows = tables._beside(paper.TABLE_2, tables.all_measured({'coco/result.json': run}), paper.COLUMNS_2[5:])
    cells = [cell for row in rows for cell in row.values() if '12.35' in str(cell)]
    assert cells == ['12.35 [11, 13.5] (clean; n = 77; tiny, reduced, stand-in random_conv_features; drawn; steps 20) [record](coco/result.json)']
    for one in tables.all_measured({'coco/result.json': run}):
        assert run.label() in (one.row()['conditions'] if one.value is None else one.cell())


@pytest.mark.parametrize('where', [where for where in committed if list((folder / where).parent.glob('*.md'))])
def test_every_table_beside_a_record_has_its_label(where):
    for table in (folder / where).parent.glob('*.md'):
        assert table.read_text().endswith(f'{committed[where].label()}; [record](result.json)\n'), table


def test_a_record_labels_the_tables_beside_it_once(tmp_path):
    write_table([{'a': 1.5, 'b': None}], tmp_path / 'one')
    before = (tmp_path / 'one.md').read_text()
    for scale in (True, False):
        run = of('?', {'a': 1.5}, reduced=scale)
        write_record(tmp_path, run)
        assert (tmp_path / 'one.md').read_text() == f'{before}\n{run.label()}; [record](result.json)\n'


def test_a_mean_is_of_all_seeds_or_of_none():
    runs = seeds('a', (1., 2., 3.)) + seeds('b', (1., None, 3.))
    a, b = tables.summarise(runs, ('right',))
    assert (a['right'], a['right, deviation'], b['right'], b['right, deviation']) == (2., 1., None, None)


@pytest.mark.parametrize('notebook, rows_of', [('ablations', tables._table_4), ('text_as_source', tables._figure_2)])
def test_a_mean_over_seeds_is_never_without_its_label(notebook, rows_of):
    variant = {'ablations': 'base', 'text_as_source': 'source'}[notebook]
    row = {'variant': variant, 'seeds': 3} | dict.fromkeys(tables.MEASURES[notebook], 41.5)
    run = of(tables.QUESTIONS[notebook], {'summary': [row], 'sentences': ['One is better.']})
    rows = [row for row in rows_of({'a/result.json': run}) if 41.5 in row.values()]
    assert rows and all(run.label() in row['conditions'] and row['record'] == '[record](a/result.json)' for row in rows)
    assert run.label() in tables._summary_rows({'a/result.json': run}, notebook)[1][0]
    assert not [row for row in rows_of({}) if 41.5 in row.values()] and tables._NOT_MEASURED in str(rows_of({}))


def test_what_could_not_be_measured_says_why_and_is_never_0():
    clip = tables.all_measured({'coco/result.json': of_coco()})[-1]
    assert clip.cell() == 'not available: needs weights [record](coco/result.json)' and clip.row()['value'] is None
    scores = dict.fromkeys(paper.SCORE_NAMES, 1.) | {'SPICE': None}
    run = of(tables.QUESTIONS['benchmark_captions'], {'method': 'FlowTok-tiny', 'sets': [
        {'set': 'a', 'n': 2, 'references': 5.0, 'scores': scores, 'not_available': {'SPICE': 'needs its parser: a line'}}]})
    rows = tables._beside(paper.TABLE_3, tables.all_measured({'c/result.json': run}), paper.SCORE_NAMES)
    assert rows[-1]['SPICE (measured here)'] == 'not available: needs its parser: a line [record](c/result.json)'


def test_an_unreduced_record_stands_in_the_papers_own_row():
    rows = tables._beside(paper.TABLE_2, tables.all_measured({'x/result.json': of_coco(reduced=False, stand_ins=())}), ('COCO FID-30K',))
    row, = [row for row in rows if row['method'] == 'FlowTok-XL']
    assert row['COCO FID-30K (paper)'] == 10.06 and '(clean; n = 77; tiny; drawn)' in row['COCO FID-30K (measured here)']


# comparisons -----------------------------------------------------------------------------------------------

def seeds(variant, values, name='right'):
    return [of('?', {'variant': variant, name: value}, seed=seed) for seed, value in enumerate(values)]


def test_verdicts():
    runs = seeds('a', (10, 11, 12)) + seeds('b', (5, 6.5, 6.5)) + seeds('c', (12, 9, 11)) + seeds('d', (1,))
    assert tables.compare(runs, 'a', 'b', 'right')['verdict'] == 'seen'
    assert tables.compare(runs, 'a', 'b', 'right', smaller=True)['verdict'] == 'not seen: the opposite is'
    assert tables.compare(runs, 'a', 'c', 'right')['verdict'] == 'within noise'
    assert tables.compare(runs, 'a', 'd', 'right')['verdict'] == 'too few seeds to tell'
    assert tables.compare(runs, 'a', 'e', 'right') is None
    stats = pytest.importorskip('scipy.stats')
    low, high = tables.interval_of([4., 6., 7.])
    expected = stats.t.interval(.95, 2, loc=17 / 3, scale=stats.sem([4., 6., 7.]))
    assert (low, high) == pytest.approx(expected)


# committed -------------------------------------------------------------------------------------------------

def test_committed_records_are_records():
    assert committed
    for path in folder.rglob('result.json'):
        if 'runs' not in path.relative_to(folder).parts[:1]:
            assert read_record(path).git['commit'] is not None, path


def test_a_comparison_is_a_row_with_its_verdict():
    comparison = {'better': 'base', 'worse': 'source KL 1e-4', 'measure': 'FID, stand-in features', 'gain': -.5, 'low': -1.25, 'high': -.1, 'seeds': 3, 'verdict': 'not seen: the opposite is'}
    row = tables._verdict_row(tables.sentence_of(comparison) + ' (tiny; [record](a/result.json))')
    assert row == {'better': 'base', 'than': 'source KL 1e-4', 'measure': 'Fréchet distance', 'gain': '-0.5', '95% interval': '-1.25 to -0.1', 'seeds': '3',
                   'expected by': 'the paper', 'measured': 'the opposite'}
    few = tables._verdict_row(tables.sentence_of(comparison | {'low': None, 'high': None, 'verdict': 'too few seeds to tell'}, 'the ordering of the recipe'))
    assert few['95% interval'] == '' and few['expected by'] == 'our recipe' and tables._verdict_row('Training memory in MB: source 112.0.') is None


def test_tables_are_what_the_records_give(tmp_path):
    copy = tmp_path / 'papers_results'
    for where in committed:
        (copy / where).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / where, copy / where)
    for there in (*folder.glob('*/*.png'), *folder.glob('*/*.webp'), *folder.glob('*/*.md')):              # the README links to them
        (copy / there.parent.name).mkdir(exist_ok=True)
        shutil.copy(there, copy / there.parent.name)
    assert not list(copy.glob('*.md'))
    made = tables.build_tables(copy)
    assert {path.name for path in made} == {f'{name}{ending}' for name in written for ending in ('.csv', '.md')} | {'README.md'}
    changed = [path.name for path in made if path.read_text() != (folder / path.name).read_text()]
    assert not changed, f'{changed}: run flowtok tables'


@pytest.mark.parametrize('file', sorted(folder.glob('*.md')), ids=lambda file: file.stem)
def test_no_table_is_wider_than_900_pixels(file):
    "As GitHub shows it: 7.5 px a character of the longest word in a cell, 26 px around it."
    def width(rows):
        cells = [[re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', cell.strip()) for cell in row.strip('|').split('|')] for row in rows if set(row) - set('|- ')]
        longest = [max(len(word) for cell in column for word in re.split(r'\s|<br>', cell)) for column in zip(*cells)]
        return 7.5 * sum(longest) + 26 * len(longest)
    assert width(['| abcdefghij | b |', '| --- | --- |', '| c d | 12 |']) == 7.5 * 12 + 52
    tables = [[line for line in block.splitlines() if line.startswith('|')] for block in re.split(r'\n\n+', file.read_text())]
    assert not [rows[0] for rows in tables if rows and width(rows) > 900]


def numbers(value):
    "All numbers inside a value, those in texts and names, too."
    if isinstance(value, bool) or value is None:
        return
    elif isinstance(value, (int, float)):
        yield float(value)
    elif isinstance(value, str):
        yield from (float(found.replace(',', '')) for found in re.findall(r'(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?', value) if found.strip(','))
    else:
        for part in (item for pair in value.items() for item in pair) if isinstance(value, dict) else value:
            yield from numbers(part)


@pytest.mark.parametrize('name', written)
def test_every_number_in_a_table_is_in_a_record_or_the_paper(name):
    known = set(numbers([asdict(run) for run in committed.values()]))
    known |= set(numbers([getattr(paper, entry) for entry in ('TABLE_1', 'TABLE_2', 'TABLE_3', 'TABLE_4', 'TABLE_5', 'TABLE_6', 'SOURCES')]))
    if name in definitions:
        known |= set(numbers([asdict(part) for part in (*presets.values(), *paper_recipes.values())]))
        known |= {4. * config.flow.width for config in presets.values()} | {float(tables._count_parameters(presets[scale])) for scale in paper.TABLE_1}
        known |= set(numbers([list(tables._table_5()), list(tables._table_6())]))
    rounded = {float(f'{x:.4g}') for x in known}
    with open(folder / f'{name}.csv', newline='') as file:
        for row in csv.DictReader(file):
            for column, cell in row.items():
                text = re.sub(r'\[record\]\([^)]*\)', '', cell) if column != 'commit' else ''
                strange = [x for x in numbers(text) if x not in known and float(f'{x:.4g}') not in rounded]
                assert not strange, f'{name}, {column}: {strange} in {cell!r}'


@pytest.mark.parametrize('path', sorted(folder.glob('*/*.csv')), ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_every_number_in_a_runs_own_table_is_in_its_record_or_the_paper(path):
    known = {abs(x) for x in numbers([asdict(read_record(path.parent)), paper.TABLE_2])}         # a minus in a text may be a dash
    rounded = {float(f'{x:.4g}') for x in known}
    with open(path, newline='') as file:
        for row in csv.DictReader(file):
            assert not [x for cell in row.values() for x in map(abs, numbers(cell)) if x not in known and x not in rounded], row


def test_summaries_say_what_the_single_runs_say():
    for notebook, measures in tables.MEASURES.items():
        found = tables._records_of(committed, notebook)
        for where, run in found.items():
            if 'summary' not in run.metrics:
                continue
            home = where.rpartition('/')[0]
            singles = [one for path, one in found.items() if path.startswith(f'{home}/') and 'variant' in one.metrics]
            again = {row['variant']: row for row in tables.summarise(singles, measures)}
            for row in run.metrics['summary']:
                for key, value in row.items():
                    expected = again[row['variant']][key]
                    assert value == expected or math.isclose(value, expected, rel_tol=1e-9)


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r'\]\((?![a-z]+:|#)([^)\s]+)', (folder / 'README.md').read_text())
    assert targets and not [target for target in targets if not (folder / target).exists()]


def test_the_command_tells_a_broken_record(tmp_path):
    run = of_coco()
    (tmp_path / 'a').mkdir()
    write_record(tmp_path / 'a', replace(run, question='Other?'))
    done = subprocess.run([sys.executable, '-m', 'flowtok.cli', 'tables', str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and '17 files' in done.stdout and 'Other?' in (tmp_path / 'README.md').read_text()
    values = json.loads((tmp_path / 'a' / 'result.json').read_text())
    del values['seed']
    (tmp_path / 'a' / 'result.json').write_text(json.dumps(values))
    done = subprocess.run([sys.executable, '-m', 'flowtok.cli', 'tables', str(tmp_path)], capture_output=True, text=True)
    assert done.returncode and 'is not a record' in done.stderr and 'Traceback' not in done.stderr


def test_run_notebooks_carry_their_questions():
    for notebook, question in tables.QUESTIONS.items():
        cells = json.loads(next((root / 'nbs').rglob(f'{notebook}.ipynb')).read_text())['cells']
        assert ''.join(cells[0]['source']).splitlines()[0] == f'# {question}', notebook
