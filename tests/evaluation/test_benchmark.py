"Benchmarks: doubles in the layout of the real sets, captions by seed, images that no batch changes."
import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowtok.evaluation import benchmark
from flowtok.evaluation.benchmark import draw_captions, generate_images, group_of, fid_scores, read_images, summary
from flowtok.toy.mock import _MJHQ_CATEGORIES, make_coco, make_mjhq
from flowtok.config import preset
from flowtok.evaluation.features import find_extractors
from flowtok.pipeline import FlowTokPipeline
from flowtok.data.convert import coco_entries, convert_images, mjhq_entries


def test_the_double_of_coco_has_its_layout(tmp_path):
    file = make_coco(tmp_path, 6)
    entry = json.loads(file.read_text())['images'][3]
    assert {'cocoid', 'imgid', 'filepath', 'filename', 'split', 'sentences'} <= entry.keys() and len(entry['sentences']) == 5
    assert entry['filename'] == 'COCO_val2014_000000000003.jpg' and all('raw' in sentence for sentence in entry['sentences'])
    entries = coco_entries(file, 'val2014')
    assert len(entries) == 6 and len(coco_entries(file, 'test')) == 3
    sizes = {Image.open(tmp_path / entry.file).size for entry in entries}
    assert len(sizes) == 3 and all(width > height == 128 for width, height in sizes)
    assert convert_images('coco', entries, tmp_path, tmp_path / 'shards')['counts'] == {'kept': 6}


def test_the_double_of_mjhq_has_its_layout(tmp_path):
    file = make_mjhq(tmp_path, 20)
    assert {len(list((tmp_path / category).iterdir())) for category in _MJHQ_CATEGORIES} == {2}
    assert len(_MJHQ_CATEGORIES) == 10
    assert convert_images('mjhq', mjhq_entries(file), tmp_path, tmp_path / 'shards')['counts'] == {'kept': 20}


def test_captions_are_of_different_images_and_known_by_their_ids(tmp_path):
    entries = coco_entries(make_coco(tmp_path, 9), 'val2014')
    drawn = draw_captions(entries, 0, 4)
    assert len({name.split('#')[0] for name, _ in drawn}) == 9 and drawn[:4] == draw_captions(entries, 4, 4)
    of = {entry.key: entry.captions for entry in entries}
    for name, caption in drawn:
        key, k = name.split('#')
        assert of[key][int(k)] == caption
    assert len({name.split('#')[1] for name, _ in drawn}) > 1


def test_images_of_one_size_go_together(tmp_path):
    for i, size in enumerate([(20, 10), (20, 10), (16, 16), (20, 10)]):
        Image.new('RGB', size, (i, 0, 0)).save(tmp_path / f'{i}.png')
    files = sorted(tmp_path.iterdir())
    assert [tuple(part.shape) for part in read_images(files)] == [(2, 3, 10, 20), (1, 3, 16, 16), (1, 3, 10, 20)]
    assert [tuple(part.shape) for part in read_images(files, 8, 3)] == [(3, 3, 8, 8), (1, 3, 8, 8)]
    assert [round(255 * part[0, 0, 0, 0].item()) for part in read_images(files)] == [0, 2, 3]


def test_scores_of_a_model(tmp_path):
    pipe, extractors = FlowTokPipeline.from_pretrained(), find_extractors()
    entries = mjhq_entries(make_mjhq(tmp_path, 20))
    files = [tmp_path / entry.file for entry in entries]
    prompts = [entry.captions[0] for entry in entries]

    def scorer(images, texts): return np.full(len(texts), 20. + len(texts[0]))
    made = generate_images(pipe, prompts, extractors, scorer, batch_size=7, num_inference_steps=2)
    other = generate_images(pipe, prompts[7:], extractors, seed=1, num_inference_steps=2)
    assert len(made.clip) == 20 and made.first.shape[0] == 16 and made.seconds > 0 and other.clip is None
    assert not torch.allclose(made.first[7], other.first[0], atol=1e-3)
    fid = fid_scores(made, extractors, files, cache=tmp_path / 'kept', name='all', bootstraps=3)
    part = fid_scores(group_of(made, [0, 5, 9]), extractors, files[:6], cache=tmp_path / 'kept', name='part', bootstraps=0)
    assert fid['tf']['n'] == 20 and fid['tf']['reference'] == 20 and part['clean']['n'] == 3 and part['clean']['low'] is None
    assert fid['tf']['interval'] == 'generated and reference images drawn' and part['clean']['interval'] == ''
    found = summary(made, pipe, fid)
    assert found['method'] == 'FlowTok-tiny' and found['clip_score']['low'] <= found['clip_score']['mean'] and found['n'] == 20


@pytest.mark.parametrize('scale, name', [('xl', 'FlowTok-XL'), ('h', 'FlowTok-H'), ('b', 'FlowTok-B'), ('tiny', 'FlowTok-tiny')])
def test_methods_are_called_as_in_the_paper(scale, name): assert benchmark.method_name(preset(scale)) == name
