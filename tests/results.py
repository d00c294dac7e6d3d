"""What the committed records say, at the top of each run notebook: `python tests/results.py` writes it, tests/test_house.py compares."""
import json
import os
from pathlib import Path

from navigation import with_cell

from flowtok.experiments.records import read_record

root = Path(__file__).resolve().parents[1]
RESULTS = {  # run notebook -> its records: folder, figures, tables that are shown, tables that are folded
    'train': [('tiny', ['prompts_by_seeds.png'], ['scores', 'variety'], ['forms', 'kinds', 'guidance', 'caption_guidance']), ('tiny_quarter_hour', [], [], ['scores', 'variety'])],
    'experiments/text_as_source': [('text_as_source', ['curves.png'], [], ['summary'])],
    'experiments/ablations': [('ablations', ['summary.png'], [], ['summary'])],
    'experiments/solvers': [('solvers', ['solvers.png'], [], ['solvers'])],
    'experiments/emoji': [('emoji', ['held_out_people.png'], [], ['text_to_image', 'image_to_text', 'features'])],
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
    return with_cell(page, 'record', results(page), 1)


if __name__ == '__main__':
    for name in RESULTS:
        page = root / 'nbs' / f'{name}.ipynb'
        page.write_text(with_results(page), encoding='utf-8')
