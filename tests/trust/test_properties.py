"Whatever a file or a caller says, the answer is a result, a count, or one ValueError."
import csv
import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowtok.config import FlowTokConfig, from_json, preset, to_json
from flowtok.data.convert import table_entries
from flowtok.data.images import read_samples
from flowtok.data.mixture import CaptionReader, ImageReader, DataSource, _list_sources, use_sample
from flowtok.pipeline import FlowTokPipeline
from flowtok.config import parse_changes

usual = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
scalars = st.one_of(st.none(), st.booleans(), st.integers(-10, 100), st.floats(), st.text(max_size=6))
anything = st.recursive(scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)), max_leaves=6)
PIPE = FlowTokPipeline.from_pretrained()


def leaves(tree, path=()):
    "The paths to all values of nested dictionaries."
    return [place for key, value in tree.items() for place in (leaves(value, (*path, key)) if isinstance(value, dict) else [(*path, key)])]


@usual
@given(st.data())
def test_configs(data):
    tree = json.loads(to_json(preset(data.draw(st.sampled_from(('tiny', 'xl'))))))
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(leaves(tree)))
        place = tree
        for key in path:
            place = place[key]
        if data.draw(st.booleans()):
            place[last] = data.draw(anything)
        else:
            place[data.draw(st.text(max_size=8))] = data.draw(anything)
    try:
        assert isinstance(from_json(json.dumps(tree)), FlowTokConfig)
    except ValueError:
        pass


@usual
@given(st.text(max_size=60))
def test_config_files_and_changes_that_are_any_text(text):
    for read in (from_json, parse_changes):
        try:
            read(text)
        except ValueError:
            pass


@usual
@given(st.lists(st.tuples(st.text(max_size=20), st.binary(max_size=80), st.sampled_from((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE))), max_size=6),
       st.integers(0, 400))
def test_archives(tmp_path_factory, members, cut):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w', format=tarfile.PAX_FORMAT) as tar:
        for name, content, kind in members:
            member = tarfile.TarInfo(name.replace('\0', '').encode(errors='ignore').decode() + '.txt')
            member.type, member.size, member.linkname = kind, len(content) if kind == tarfile.REGTYPE else 0, '/etc/passwd'
            tar.addfile(member, io.BytesIO(content))
    path = tmp_path_factory.mktemp('tar') / '0.tar'
    whole = stream.getvalue()
    path.write_bytes(whole[:len(whole) - 25 * cut] if cut < 300 else whole)
    faults = Counter()
    for sample in read_samples([str(path)], faults):
        for reader in (CaptionReader(), ImageReader(64)):
            use_sample(dict(sample), DataSource(str(path)), reader, np.random.default_rng(0), faults)
    assert all(isinstance(reason, str) and n > 0 for reason, n in faults.items())


@usual
@given(st.lists(st.dictionaries(st.sampled_from(('file', 'caption', 'image', 'text', 'x')), st.text(max_size=12), min_size=1), max_size=5), st.sampled_from(('.csv', '.tsv', '.jsonl')))
def test_tables(tmp_path_factory, rows, ending):
    path = tmp_path_factory.mktemp('table') / f't{ending}'
    if ending == '.jsonl':
        path.write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8', errors='surrogatepass')
    else:
        with open(path, 'w', newline='', encoding='utf-8', errors='ignore') as file:
            writer = csv.DictWriter(file, ('file', 'caption', 'image', 'text', 'x'), delimiter=',' if ending == '.csv' else '\t')
            writer.writeheader()
            writer.writerows(rows)
    try:
        assert all(isinstance(entry.file, str) for entry in table_entries(path))
    except ValueError:
        pass


@usual
@given(anything)
def test_lists_of_sources(entries):
    with pytest.raises((ValueError, FileNotFoundError)):
        _list_sources(entries, 'list.json')


@usual
@given(st.fixed_dictionaries({'prompt': st.one_of(st.just('a blue star'), anything)}, optional={
    name: st.one_of(scalars.filter(lambda x: not isinstance(x, int) or x < 4), st.lists(scalars, max_size=3)) for name in (
        'num_inference_steps', 'guidance_scale', 'generator', 'num_images_per_prompt', 'batch_size', 'temperature', 'guidance_interval', 'solver', 'times')}))
def test_arguments_of_the_pipeline(named):
    try:
        assert torch.isfinite(PIPE(output_type='pt', **({'num_inference_steps': 1} | named))).all()
    except ValueError:
        pass
