"""What the committed records say, at the top of each run notebook and on the front page: `python tests/results.py` writes it, tests/test_house.py compares."""
import json
import os
from pathlib import Path
from statistics import mean

from navigation import INDEX, with_cell

from flowtok.lab.records import read_record

root = Path(__file__).resolve().parents[1]
RESULTS = {  # run notebook -> its records: folder, figures, tables that are shown, tables that are folded
    'train': [('tiny', ['prompts_by_seeds.png'], ['scores', 'variety'], ['forms', 'kinds', 'guidance', 'caption_guidance']), ('tiny_quarter_hour', [], [], ['scores', 'variety'])],
    'experiments/text_as_source': [('text_as_source', ['curves.png'], [], ['summary'])],
    'experiments/ablations': [('ablations', ['summary.png'], [], ['summary'])],
    'experiments/solvers': [('solvers', ['solvers.png'], [], ['solvers'])],
    'experiments/emoji': [('emoji', ['held_out_people.png'], [], ['text_to_image', 'image_to_text', 'features'])],
    'experiments/one_network': [('one_network', ['one_network.png', 'few_steps.png'], ['summary'], ['gaps', 'both', 'few_steps', 'errors', 'speed'])],
    'experiments/text_encoders': [('text_encoders', ['text_encoders.png'], [], ['text_encoders'])],
    'experiments/benchmark_captions': [('captions', ['captions.png'], ['scores'], [])],
    'experiments/benchmark_coco': [('coco', ['pictures.png'], [], [])],
    'experiments/benchmark_mjhq': [('mjhq', ['pictures.png'], [], ['categories'])],
    'experiments/benchmark_speed': [('speed', [], ['speed'], []), ('speed_h200/pipelines', [], ['speed'], []), ('speed_h200/networks', [], [], ['speed'])],
    'experiments/cluster': [('cluster', ['memory.png'], [], ['gpu_memory', 'run'])],
    'experiments/speed': [('speed_xl_h200', ['growth.png'], ['sampling'], ['tricks', 'stages', 'training', 'floor']), ('speed_tiny', [], ['sampling'], ['tricks', 'stages', 'training', 'muon']),
                          ('speed_b', [], [], ['sampling', 'training']), ('speed_b_h200', [], [], ['sampling', 'training'])]}


def table(file: Path) -> str:
    "A table of a record, without the label below it."
    return '\n'.join(line for line in file.read_text(encoding='utf-8').splitlines() if line.startswith('|'))


def results(page: Path) -> str:  # Markdown
    "What the records of a run notebook say."
    parts = ['## What the committed records say', 'Running the page runs the experiment again, at the size of its parameters, and writes a record of its own.']
    for name, figures, shown, folded in RESULTS[page.relative_to(root / 'nbs').with_suffix('').as_posix()]:
        folder = root / 'papers_results' / name
        if not (folder / 'result.json').exists():
            continue
        record, link = read_record(folder), os.path.relpath(folder, page.parent)
        machine = ', '.join(record.hardware.get('gpus') or [record.hardware['cpu']])
        parts.append(f"**[{name}]({link}/result.json)**: {record.label()}; {record.started[:10]}, {machine}")
        parts += [f'![{Path(file).stem.replace("_", " ")}]({link}/{file})' for file in figures]
        parts += [table(folder / f'{one}.md') for one in shown]
        parts += [f'<details><summary>{one.replace("_", " ")}</summary>\n\n{table(folder / f"{one}.md")}\n\n</details>' for one in folded if (folder / f'{one}.md').exists()]
    return '\n\n'.join(parts)


def with_results(page: Path) -> str:  # the notebook's text
    "A run notebook with what its records say below its title."
    return with_cell(json.loads(page.read_text(encoding='utf-8')), 'record', results(page), 1)


def front() -> str:  # Markdown
    "The main results, each from its record."
    def rows(name, what, **which):
        found = read_record(root / 'papers_results' / name).metrics[what]
        return [row for row in found if all(row.get(key) == value for key, value in which.items())]

    def row(*args, **which): return rows(*args, **which)[0]
    def average(found, key): return mean(one[key] for one in found)
    scenes, painter = (row('tiny', 'variety', split='held_out', model=model) for model in ('this model', 'mean painter'))
    said = row('tiny', 'scores', split='held_out', measure='caption equivalent')
    people, cheat = (row('emoji', 'text to image', of='people, held out', way=way) for way in ('model', 'cheat: most similar name'))
    names = row('emoji', 'image to text', of='people, held out')
    source, cross = (row('text_as_source', 'summary', variant=variant) for variant in ('source', 'cross'))
    lines = [
        ('Drawn scenes from captions never trained on', f"{scenes['accuracy (%)']:.1f}% right ({scenes['accuracy, low']:.1f} to {scenes['accuracy, high']:.1f}), images of one caption {scenes['spread ratio']:.2f} times as varied as true ones",
         f"a painter of means: {painter['accuracy (%)']:.1f}%, {painter['spread ratio']:.2f} times", 'tiny'),
        ('Captions of drawn scenes never trained on', f"{said['percent']:.1f}% true ({said['low']:.1f} to {said['high']:.1f})", '', 'tiny')]
    one, two = row('one_network', 'both directions', model='longer', steps=20), rows('one_network', 'both directions', model='two', steps=20)
    teacher = row('one_network', 'few steps', model='teacher, Euler', steps=20)
    few = {k: row('one_network', 'both directions', model='longer_map', steps=k) for k in (4, 1)}
    lines += [
        ('One network for both directions, trained on from the flow (one seed)', f"images {one['accuracy (%)']:.1f}% right, captions by one step back {one['captions, 1 step (%)']:.1f}% true; {one['parameters of the flows'] / 1e6:.1f} million parameters",
         f"the flow it started from: {teacher['accuracy (%)']:.1f}%; two networks trained on for fewer steps: {average(two, 'accuracy (%)'):.1f}% and {average(two, 'captions, 1 step (%)'):.1f}%, {two[0]['parameters of the flows'] / 1e6:.1f} million", 'one_network'),
        ('The same network as a flow map, in 4 steps and in 1', f"images {few[4]['accuracy (%)']:.1f}% and {few[1]['accuracy (%)']:.1f}% right, captions {few[4]['captions, 1 step (%)']:.1f}% true", f"20 guided steps: {one['accuracy (%)']:.1f}%", 'one_network')]
    lines += [
        ('Text as source against cross-attention, equal cost', f"{source['accuracy (%)']:.1f}%", f"cross-attention: {cross['accuracy (%)'] + 1e-9:.1f}%", 'text_as_source'),
        ('Emoji of people in combinations never trained on', f"{people['all three (%)']:.1f}% right in role, gender and tone ({people['top-1, low']:.1f} to {people['top-1, high']:.1f})", f"copy of the most similar name: {cheat['all three (%)']:.1f}%", 'emoji'),
        ('Names of such emoji', f"{names['exact (%)']:.1f}% exact ({names['exact, low']:.1f} to {names['exact, high']:.1f})", '', 'emoji')]
    return '\n'.join(['| measured on two CPU cores | result | beside it |', '|---|---|---|'] + [
        f'| {what} | [{result}](../papers_results/{name}/result.json) | {beside} |' for what, result, beside, name in lines])


def with_front() -> str:  # the index's text
    "The index with the main results below its first paragraphs."
    notebook = json.loads(INDEX.read_text(encoding='utf-8'))
    at = next(i for i, cell in enumerate(notebook['cells']) if cell['id'] == '7a971d28') + 1
    return with_cell(notebook, 'results', front(), at)


if __name__ == '__main__':
    INDEX.write_text(with_front(), encoding='utf-8')
    for name in RESULTS:
        page = root / 'nbs' / f'{name}.ipynb'
        page.write_text(with_results(page), encoding='utf-8')
