"Measures of variety on constructed cases: a perfect sampler, a mean painter, a sampler of one image."
from collections import Counter

import numpy as np
import pytest
import torch

from flowtok.evaluation.metrics import frechet_distance, gaussian_statistics, random_conv_features
from flowtok.toy.verifier import Reading, Seen, is_true, parse, read
from flowtok.toy.shapes import PAIRS, SPLITS, TONES, captions, draw_scene, render
from flowtok.toy.variety import (_FORMS, OPEN, VARIETY, _draw_fitting, fitting_images, _form_prompts, form_scores, image_scores, mean_images,
                             _nearest_cells, _open_values, precision_recall, _read_all, references_of, spread, spread_ratio, _tally,
                             total_variation, variety_prompts)

PROMPTS = variety_prompts('held_out', 150)


@pytest.fixture(scope='module')
def references():
    return references_of(PROMPTS)


@pytest.fixture(scope='module')
def scores(references):
    "All measures of three models that need no training."
    one = fitting_images(['a red circle top left on grey'], 0).expand(len(PROMPTS), -1, -1, -1)
    images = {'perfect': fitting_images(PROMPTS, 50), 'mean': mean_images(PROMPTS, 50, 12), 'one': one}
    return {name: image_scores(x, references, draws=4) for name, x in images.items()}


def test_a_perfect_sampler_is_right_and_varied(scores):
    perfect = scores['perfect']
    assert perfect['accuracy (%)'] > 98 and perfect['accuracy, low'] < perfect['accuracy (%)'] <= perfect['accuracy, high']
    assert perfect['tone TV'] < .2 and perfect['texture TV'] < .12 and perfect['size TV'] < .15 and perfect['tilt TV'] < .2
    assert perfect['precision'] > .85 and perfect['recall'] > .85 and perfect['FID, low'] <= perfect['FID, stand-in features'] < 1


def test_a_mean_painter_is_found_out(scores):
    perfect, mean = scores['perfect'], scores['mean']
    assert mean['tone TV'] > perfect['tone TV'] + .25 and mean['texture TV'] > .15 and mean['tilt TV'] > perfect['tilt TV'] + .1
    assert mean['FID, stand-in features'] > 5 * perfect['FID, stand-in features'] and mean['precision'] < perfect['precision'] - .1


def test_a_sampler_of_one_image_is_found_out(scores):
    one = scores['one']
    assert one['accuracy (%)'] < 10 and one['recall'] < .1 and one['tone TV'] > .5
    assert set(VARIETY) <= set(one)


def test_spread_ratio_of_the_three():
    few = PROMPTS[:5]
    same = {text: fitting_images([text], 3) for text in few}
    perfect, low, high = spread_ratio(lambda texts: fitting_images(texts, 60), few, 24)
    assert .8 < perfect < 1.2 and low < perfect < high
    assert spread_ratio(lambda texts: same[texts[0]].expand(len(texts), -1, -1, -1), few, 8)[0] < 1e-5
    assert spread_ratio(lambda texts: mean_images(texts[:1], 1, 8).expand(len(texts), -1, -1, -1), few, 8)[0] < 1e-5


def test_spread_is_the_root_mean_square_distance():
    x = np.array([[0., 0.], [2., 0.], [0., 2.], [2., 2.]])
    assert spread(x) == pytest.approx(2**.5) and spread(3 * x) == pytest.approx(3 * 2**.5) and spread(x[:1]) == 0


@pytest.mark.parametrize('split', SPLITS)
def test_fitting_scenes_fit_their_captions(split):
    rng = np.random.default_rng(0)
    for seed in range(40):
        for text in captions(draw_scene(seed, split), seed, split=split)[::2]:
            assert is_true(text, _draw_fitting(text, rng)), text


def test_fitting_scenes_leave_open_what_the_caption_does():
    rng = np.random.default_rng(0)
    scenes = [_draw_fitting('a blue star', rng) for _ in range(900)]
    tones = Counter(scene.tone for scene in scenes)
    cells = Counter(cell for scene in scenes for cell in _nearest_cells(scene.things))
    assert all(abs(tones[tone] / 900 - 1 / 3) < .06 for tone in TONES) and len(cells) == 9 and min(cells.values()) > 60
    assert abs(sum(scene.texture == 'plain' for scene in scenes) / 900 - .7) < .06
    assert {scene.tone for scene in (_draw_fitting('a blue star on black', rng) for _ in range(20))} == {'black'}


def test_total_variation():
    assert total_variation(Counter(a=2, b=2), Counter(a=50, b=50)) == 0
    assert total_variation(Counter(a=3), Counter(b=4)) == 1 and total_variation(Counter(a=1, b=3), Counter(a=1, b=1)) == .25
    assert total_variation(Counter(), Counter(a=1)) is None


def test_open_values_are_those_that_no_word_decides():
    thing = Seen('star', 'blue', 'small', .24, .5, .1, 0.)
    reading = Reading((thing,), 'grey', 'plain')
    free, bound = _open_values(parse('a blue star'), reading), _open_values(parse('small blue star middle left on grey'), reading)
    assert free['tone'] == ['grey'] and free['texture'] == ['plain'] and free['size'] == ['small'] and free['cell'] == [(0, 1)] and free['place'] == []
    assert bound['tone'] == [] and bound['texture'] == ['plain'] and bound['size'] == [] and bound['cell'] == [] and bound['place'] == [(1, 1)]
    assert set(_tally(['a blue star'], [reading])) == set(OPEN)


def test_what_is_unclear_has_no_attributes():
    blot = Reading((Seen('unclear', 'blue', 'small', float('nan'), .5, 1.),), 'grey', 'plain')
    assert _open_values(parse('a blue star'), blot) == {'tone': ['grey'], 'texture': ['plain'], 'size': [], 'tilt': [], 'place': [], 'cell': []}


def test_precision_and_recall_of_known_clouds():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 400, 4))
    assert min(precision_recall(a, b)) > .75
    half = precision_recall(b[b[:, 0] > 0], a)
    assert half[0] > .8 and half[1] < .7
    assert precision_recall(a + 100, b) == (0., 0.)
    with pytest.raises(ValueError):
        precision_recall(a[:3], b)


def test_tilts_are_read_to_six_degrees():
    for seed in range(40):
        scene = draw_scene(seed)
        for o in read(render(scene)).things:
            true = min(scene.things, key=lambda t: (t.x - o.x)**2 + (t.y - o.y)**2)
            if true.shape not in ('circle', 'ring'):
                assert abs(o.angle - true.angle) < np.radians(8), (seed, o, true)


def test_forms_are_the_prompts_that_people_type():
    for form in _FORMS:
        prompts = _form_prompts(form)
        assert len(prompts) == len(set(prompts)) == len(PAIRS) and all(parse(text) for text in prompts)
    assert 'two blue crosses' in _form_prompts('two C Ss') and 'an orange bar' in _form_prompts('a C S')
    rows = form_scores(lambda prompts: fitting_images(prompts, 9), repeats=1)
    assert [row['form'] for row in rows] == [*_FORMS, 'all'] and rows[-1]['right'] >= .97 * rows[-1]['of'] == .97 * 288
    empty = form_scores(lambda prompts: torch.full((len(prompts), 3, 64, 64), .5), repeats=1)
    assert empty[-1]['right'] == 0 and empty[-1]['cell TV'] is None


def test_the_distance_is_that_of_the_metrics_chapter(references):
    images = fitting_images(PROMPTS, 50)
    own = gaussian_statistics(random_conv_features(images))
    wanted = frechet_distance(*own, references.features.mean, references.features.cov)
    assert image_scores(images, references, draws=0)['FID, stand-in features'] == pytest.approx(wanted)
    assert len(_read_all(images[:3])) == 3


def test_the_weights_of_the_package_draw_many_images_for_one_caption():
    from flowtok.pipeline import FlowTokPipeline
    pipe, text = FlowTokPipeline.from_pretrained(), 'a yellow cross top left'
    images = pipe([text] * 48, generator=torch.Generator().manual_seed(0), output_type='pt', text_at_decoding=False)
    readings = _read_all(images)
    tones = Counter(reading.tone for reading in readings)
    assert all(tones[tone] >= 4 for tone in TONES) and len({reading.texture for reading in readings}) >= 3
    right = sum(reading.things[0].colour == 'yellow' and reading.things[0].shape == 'cross' for reading in readings if len(reading.things) == 1)
    true = fitting_images([text] * 48, 0)
    assert right >= 38 and spread(random_conv_features(images)) > .6 * spread(random_conv_features(true))
