"Retrieval as a judge: what a perfect, a wrong, a copying and a blurring model score."

import numpy as np
import pytest
import torch

from flowtok.data.images import to_images
from flowtok.toy.shapes import captions, draw_scene, render
from flowtok.toy.retrieval import (Gallery, _blurred, copy_share, _drawing_numbers, find_stand_in, name_scores, own_data_scores, retrieval_scores, score_rows,
                                          _squared_distances)
from flowtok.pipeline import FlowTokPipeline


@pytest.fixture(scope='module')
def gallery():
    return to_images(np.stack([render(draw_scene(i), 32) for i in range(60)]))


def test_distances_are_euclidean():
    a, b = torch.randn(5, 7), torch.randn(6, 7)
    assert torch.allclose(_squared_distances(a, b), torch.cdist(a, b).square(), atol=1e-4)


def test_a_perfect_model_and_one_of_wrong_images(gallery):
    own = list(range(0, 60, 2))
    perfect = retrieval_scores(gallery[own], own, Gallery(gallery))
    assert perfect['top-1']['percent'] == perfect['top-5']['percent'] == 100 and perfect['top-1']['low'] > 85
    wrong = retrieval_scores(gallery[own].roll(1, 0), own, Gallery(gallery))
    assert wrong['top-1']['percent'] == 0 and wrong['top-1']['high'] > 0
    mean = retrieval_scores(gallery.mean(0).expand(30, -1, -1, -1), own, Gallery(gallery))
    assert mean['top-1']['percent'] < 5                          # a painter of the mean is one image's neighbour at most
    with pytest.raises(ValueError, match='16.*32'):
        Gallery(gallery).nearest(gallery[:, :, :16, :16])


def test_a_small_shift_is_forgiven_after_a_blur(gallery):
    shifted = gallery.roll(1, 3)
    found = (Gallery(gallery).nearest(shifted, 1)[:, 0] == torch.arange(60)).float().mean()
    assert found > .9 and _blurred(gallery, 0).equal(gallery.flatten(1))


def test_equal_drawings_are_one():
    gallery = torch.rand(4, 3, 16, 16)
    gallery[2] = gallery[0]
    names = ['man walking', 'woman walking', 'person walking', 'woman judge dark skin tone']
    assert _drawing_numbers(gallery).tolist() == [0, 1, 0, 3]
    scores = retrieval_scores(gallery, [0, 1, 2, 3], Gallery(gallery, names))
    assert all(score['percent'] == 100 for score in scores.values())
    scores = retrieval_scores(gallery[[1, 1, 1, 1]], [0, 1, 2, 3], Gallery(gallery, names))
    assert [scores[part]['percent'] for part in ('top-1', 'role', 'gender', 'tone', 'all three')] == [25, 75, 50, 75, 25]


def test_copies_are_found_out(gallery):
    own, training = gallery[:20], gallery[20:]
    known = Gallery(training)
    assert copy_share(own, own, known)['percent'] == 0 and copy_share(training[:20], own, known)['percent'] == 100


def test_names_are_scored_in_parts():
    scores = name_scores(['woman judge medium - dark skin tone', 'man judge', 'a cat'], ['woman judge: medium-dark skin tone', 'woman judge', 'a dog'])
    assert [round(scores[part]['percent']) for part in ('exact', 'role', 'gender', 'tone', 'all three')] == [33, 67, 67, 100, 33]


def test_the_stand_in_is_named_and_reads_images(gallery):
    stand_in = find_stand_in()
    if stand_in is None:
        pytest.skip("needs pip install 'flowtok[real]'")
    rows = stand_in(gallery[:4])
    assert rows.shape == (4, 1280) and np.isfinite(rows).all() and stand_in.stand_in and 'FID' not in stand_in.name
    blur, noise = (np.square(stand_in(x.clip(0, 1)) - rows).sum(1).mean() for x in (_blurred(gallery[:4]).view(4, 3, 32, 32), gallery[:4] + .5 * torch.randn(4, 3, 32, 32)))
    assert 0 < blur < noise


def test_scores_of_ones_own_data():
    pipe = FlowTokPipeline.from_pretrained()
    scenes = [draw_scene(i, 'seen') for i in range(12)]
    images, texts = to_images(np.stack([render(scene, 64) for scene in scenes])), [captions(scene, i, 1, 'seen')[0] for i, scene in enumerate(scenes)]
    scores = own_data_scores(pipe, images, texts)
    assert scores['psnr'] > 25 and scores['reconstruction']['top-1']['percent'] == 100 and scores['n'] == 12
    rows = score_rows(scores)
    assert {'value', 'low', 'high', 'n'} < set(rows[0]) and any(scores['distance']['features'] in row['measure'] for row in rows)
    part = own_data_scores(FlowTokPipeline(pipe.config, tokenizer=pipe.tokenizer), images, texts)
    assert part.keys() == {'n', 'psnr', 'reconstruction'}
