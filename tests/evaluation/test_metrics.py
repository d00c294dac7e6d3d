"""Numbers of flowtok.evaluation.metrics against other implementations and closed forms."""
import shutil

import numpy as np
import pytest
import torch

from flowtok.evaluation import metrics
from flowtok.toy import scores


def gaussian(d, seed, n=None):
    "Statistics of n random rows of d correlated features."
    rng = np.random.default_rng(seed)
    return metrics.gaussian_statistics(rng.normal(size=(n or 3 * d, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d))


@pytest.mark.parametrize('right, n', [(0, 7), (3, 10), (97, 100), (500, 500)])
def test_wilson_bounds_solve_their_equation(right, n):
    z = 1.959963984540054
    for bound in metrics.accuracy_interval(right, n):
        assert (right / n - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n, abs=1e-9)


def test_wilson_agrees_with_published_values():
    low, high = metrics.accuracy_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize('arguments', [(1, 0), (-1, 5), (6, 5), (1, 2, 0.), (1, 2, 1.)])
def test_wilson_refuses_what_is_no_count(arguments):
    with pytest.raises(ValueError):
        metrics.accuracy_interval(*arguments)


@pytest.mark.parametrize('d', [1, 5, 40])
def test_frechet_distance_is_the_one_of_the_matrix_root(d):
    linalg = pytest.importorskip('scipy.linalg')
    (mean1, cov1), (mean2, cov2) = gaussian(d, 0), gaussian(d, 1)
    root = np.real(linalg.sqrtm(cov1 @ cov2))
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert metrics.frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_agrees_with_torch_fidelity():
    fid = pytest.importorskip('torch_fidelity.metric_fid')
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 32)).astype('float32'), rng.normal(0.3, 1.2, size=(400, 32)).astype('float32')
    statistics = [fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)['frechet_inception_distance']
    ours = metrics.frechet_distance(*metrics.gaussian_statistics(a), *metrics.gaussian_statistics(b))
    assert ours == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_is_symmetric_and_zero_on_itself_when_singular():
    one, two = gaussian(64, 0, n=10), gaussian(64, 1, n=10)
    assert metrics.frechet_distance(*one, *two) == pytest.approx(metrics.frechet_distance(*two, *one), rel=1e-9)
    assert metrics.frechet_distance(*one, *one) < 1e-6 * np.trace(one[1])


def test_gaussian_statistics_is_numpys_and_takes_tensors():
    features = np.random.default_rng(0).normal(1e4, 1e-2, size=(200, 6))
    mean, cov = metrics.gaussian_statistics(torch.from_numpy(features))
    assert np.allclose(mean, features.mean(0)) and np.allclose(cov, np.cov(features, rowvar=False), rtol=1e-9, atol=0)


def test_frechet_distance_refuses_wrong_shapes_and_no_covariance():
    with pytest.raises(ValueError):
        metrics.frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError):
        metrics.frechet_distance(np.zeros(2), np.diag([1., -1.]), np.zeros(2), np.eye(2))


def test_stand_in_features_are_fixed_and_batches_do_not_matter():
    images = torch.rand(10, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = metrics.random_conv_features(images, channels=4)
    assert features.shape == (10, 12)
    assert np.allclose(features[3:5], metrics.random_conv_features(images[3:5], channels=4), atol=1e-6)
    other = images.flip(0) ** 2
    whole, parts = metrics.image_fid(images, other), metrics.image_fid(images, other, batch_size=3)
    assert whole == pytest.approx(parts, rel=1e-3) and whole > 1e-3


def test_psnr_of_an_exact_image_is_infinite():
    images = torch.rand(2, 3, 4, 4)
    assert metrics.psnr(images, images) == float('inf')


references = [['A man rides a horse.', 'Someone is riding a horse'], ['Two dogs, playing in the snow!', 'dogs in snow']]
candidates = ['a man on a horse', 'two dogs are playing']


def test_captions_agree_with_the_reference_program():
    pytest.importorskip('pycocoevalcap')
    if shutil.which('java') is None:
        pytest.skip('needs Java')
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    rows = [text for texts in references for text in texts] + ['a "quoted" (bracketed) close-up; it\'s - odd: 3.5', '']
    theirs = PTBTokenizer().tokenize({i: [{'caption': text}] for i, text in enumerate(rows)})
    assert metrics.tokenize_captions(rows) == ([theirs[i][0] for i in range(len(rows))], 'ptb')
    scores = metrics.caption_scores(candidates, references, ('BLEU-4',))
    tokens = PTBTokenizer().tokenize({i: [{'caption': text} for text in texts] for i, texts in enumerate(references)})
    expected = Bleu(4).compute_score(tokens, {i: [text] for i, text in enumerate(candidates)}, verbose=0)[0][3]
    assert scores['BLEU-4'] == pytest.approx(100 * expected)
    assert set(scores) == {'BLEU-4', 'intervals', 'tokenizer', 'not_available'}


def test_intervals_hold_the_score_and_are_of_the_images_drawn():
    pytest.importorskip('pycocoevalcap')
    said = [f'a {colour} {shape} on a wide grey ground' for colour in ('red', 'green', 'blue') for shape in ('star', 'ring', 'bar', 'cross')]
    mixed = said[:6] + ['two dogs are playing in the snow now'] * 6
    right, half = (metrics.caption_scores(texts, [[text] for text in said], ('BLEU-4', 'ROUGE-L', 'CIDEr')) for texts in (said, mixed))
    for name in ('BLEU-4', 'ROUGE-L', 'CIDEr'):
        (low, high), (least, most) = half['intervals'][name], right['intervals'][name]
        assert low < half[name] < high and most - least < high - low, name
    assert right['intervals']['BLEU-4'] == pytest.approx((100, 100))
    assert metrics._draws_interval(lambda rows: rows.mean(), 101) == metrics._draws_interval(lambda rows: rows.mean(), 101)
    low, high = metrics._draws_interval(lambda rows: np.arange(100)[rows].mean(), 100, draws=2000)
    assert high - low == pytest.approx(2 * 1.96 * np.arange(100).std() / 10, rel=.1)


def test_empty_captions_are_scored_not_lost():
    pytest.importorskip('pycocoevalcap')
    names = ('BLEU-4', 'METEOR', 'ROUGE-L', 'CIDEr')
    scores = metrics.caption_scores(['', 'two dogs are playing'], references, names)
    assert 0 < scores['ROUGE-L'] < metrics.caption_scores(candidates, references, ('ROUGE-L',))['ROUGE-L']
    if shutil.which('java'):
        assert not scores['not_available'] and 0 < scores['METEOR'] < 100


def test_without_java_scores_are_none_with_a_reason(monkeypatch):
    pytest.importorskip('pycocoevalcap')
    monkeypatch.setattr(metrics.shutil, 'which', lambda name: None)
    scores = metrics.caption_scores(candidates, references)
    assert scores['METEOR'] is None and scores['SPICE'] is None and scores['BLEU-4'] is not None
    assert scores['tokenizer'] == 'plain' and 'openjdk' in scores['not_available']['METEOR']


def test_without_the_package_every_score_is_none(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, 'find_spec', lambda name: None)
    scores = metrics.caption_scores(candidates, references)
    assert all(scores[name] is None for name in metrics.SCORES) and scores['tokenizer'] is None
    assert set(scores['not_available']) == set(metrics.SCORES)


def test_a_failing_program_gives_none_and_its_reason(monkeypatch):
    pytest.importorskip('pycocoevalcap')

    def fails(name, references, candidates):
        raise OSError('no memory')
    monkeypatch.setattr(metrics, '_score_captions', fails)
    scores = metrics.caption_scores(candidates, references)
    assert scores['CIDEr'] is None and 'no memory' in scores['not_available']['CIDEr']


def test_exact_captions_need_no_commas():
    from types import SimpleNamespace as Of
    scenes, known = scores.scene_prompts('seen', 6)
    said = [five[i % 5].replace(',', '') for i, five in enumerate(known)]
    said[0], said[1] = 'a shape ' * len(scenes[0].things), 'no caption'  # true but none of the five; neither
    pipe = Of(config=Of(tokenizer=Of(image_size=64)), caption=lambda images: [text.strip() for text in said])
    assert scores.image_to_text_scores(pipe, 'seen', 6) == {'equivalent': 5, 'exact': 4}


def test_things_anywhere_are_judged_on_such_scenes():
    from types import SimpleNamespace as Of
    (near, _), (free, known) = (scores.scene_prompts('held_out', 6, anywhere=x) for x in (0., 1.))
    assert near != free
    pipe = Of(config=Of(tokenizer=Of(image_size=64)), caption=lambda images: [five[0].replace(',', '') for five in known])
    assert scores.image_to_text_scores(pipe, 'held_out', 6, anywhere=1.) == {'equivalent': 6, 'exact': 6}
    assert scores.image_to_text_scores(pipe, 'held_out', 6)['equivalent'] < 6


HYPOTHESES = ['this is the model generated sentence1 which seems good enough', 'this is sentence2 which has been generated by your model']
REFERENCES = [['this is one reference sentence for sentence1', 'this is one more reference sentence for sentence1'],
              ['this is a reference sentence for sentence2 which was generated by your model', 'this is the second reference sentence for sentence2']]


@pytest.mark.parametrize('name, published', [('BLEU-1', 55.0000), ('BLEU-2', 42.8174), ('BLEU-3', 28.4043), ('BLEU-4', 20.1143), ('METEOR', 29.5797),
                                             ('ROUGE-L', 52.2104), ('CIDEr', 124.2192)])
def test_a_published_example_to_four_digits(name, published):
    "The example of nlg-eval's documentation."
    pytest.importorskip('pycocoevalcap')
    if name == 'METEOR' and shutil.which('java') is None:
        pytest.skip('needs Java')
    assert metrics.caption_scores(HYPOTHESES, REFERENCES, (name,))[name] == pytest.approx(published, abs=6e-5)


def test_scores_of_our_own_sentences_are_the_packages():
    pytest.importorskip('pycocoevalcap')
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    said, true = ['a red star above a blue ring', 'two green bars on a dark ground'], [['a red star over a blue ring', 'a star and a ring'], ['two bars of green on black']]
    own = metrics.caption_scores(said, true, ('BLEU-1', 'BLEU-2', 'BLEU-3', 'BLEU-4', 'ROUGE-L', 'CIDEr'))
    truth, answer = dict(enumerate(true)), {i: [text] for i, text in enumerate(said)}
    expected = [*Bleu(4).compute_score(truth, answer, verbose=0)[0], Rouge().compute_score(truth, answer)[0], Cider().compute_score(truth, answer)[0]]
    assert [own[name] for name in ('BLEU-1', 'BLEU-2', 'BLEU-3', 'BLEU-4', 'ROUGE-L', 'CIDEr')] == pytest.approx([100 * x for x in expected], abs=1e-6)


def test_kernel_distance_agrees_with_torch_fidelity():
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 24)), rng.normal(size=(60, 24)) + .3
    theirs = kid_features_to_metric(torch.tensor(a), torch.tensor(b), kid_subsets=1, kid_subset_size=60, verbose=False)[KEY_METRIC_KID_MEAN]
    assert metrics.kernel_distance(a, b) == pytest.approx(theirs, rel=1e-6)
    assert abs(metrics.kernel_distance(a, rng.normal(size=(80, 24)))) < .1 < metrics.kernel_distance(a, b)
    for bad in (a[:1], a[:, :5], a * np.nan):
        with pytest.raises(ValueError):
            metrics.kernel_distance(bad, b)


def test_precision_and_recall_agree_with_torch_fidelity():
    "Two Gaussian clouds that overlap in a part; theirs counts strictly inside, ours with the border, which is the same for continuous features."
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
    from flowtok.toy.variety import precision_recall
    rng = np.random.default_rng(0)
    generated, true = rng.normal(size=(300, 8)) * .8 + .3, rng.normal(size=(300, 8))
    theirs = prc_features_to_metric(torch.tensor(generated), torch.tensor(true), prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    ours = precision_recall(generated, true, 3)
    assert ours == pytest.approx((theirs[KEY_METRIC_PRECISION], theirs[KEY_METRIC_RECALL]), abs=.01) and .2 < ours[1] < ours[0] <= 1
