"Features for FID: the two ways to resize, Inception layer by layer, kept references, the CLIP score."
import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from flowtok.evaluation import features
from flowtok.evaluation.metrics import frechet_distance, gaussian_statistics


def some_images(n=3, h=40, w=56, seed=0):
    return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(seed))


def test_clean_is_pillows_bicubic_in_floating_point():
    images = some_images()
    small = features._resize_clean(images, 30)
    plane = (255 * images[1, 2]).round().numpy().astype(np.float32)
    assert np.array_equal(small[1, 2].numpy(), np.asarray(Image.fromarray(plane).resize((30, 30), Image.Resampling.BICUBIC)).clip(0, 255))
    assert small.min() >= 0 and small.max() <= 255 and not torch.equal(small, small.round())


def test_both_ways_leave_an_image_of_the_right_size_alone():
    images = some_images(h=30, w=30)
    for resize in features.RESIZES.values():
        assert torch.allclose(resize(images, 30), (255 * images).round())


def test_tf_takes_every_fourth_pixel():
    images = some_images(h=64, w=64)
    assert torch.allclose(features._resize_tf(images, 16), (255 * images).round()[:, :, ::4, ::4])


@pytest.fixture
def network(tmp_path, monkeypatch):
    "Inception with random weights, through the loader."
    extractor = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3').FeatureExtractorInceptionV3
    monkeypatch.setattr(extractor, 'load_state_dict', lambda self, state: None)
    torch.save({}, tmp_path / 'weights.pth')
    monkeypatch.setattr(features, '_INCEPTION_SHA256', hashlib.sha256((tmp_path / 'weights.pth').read_bytes()).hexdigest())
    torch.manual_seed(0)
    return features.load_inception(tmp_path / 'weights.pth')


def test_features_are_torch_fidelitys(network):
    images = some_images(2, 80, 80)
    expected, = network((255 * images).round().to(torch.uint8))
    found = features._inception_features(network, features._resize_tf(images))
    assert found.shape == (2, 2048) and np.allclose(found, expected.numpy(), rtol=1e-3, atol=0)
    clean = features._inception_features(network, features._resize_clean(images))
    assert clean.shape == (2, 2048) and not np.allclose(clean, found, rtol=1e-2, atol=0)


def test_other_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(features.torch.hub, 'get_dir', lambda: str(tmp_path))
    assert features._find_inception() is None and features.find_extractors()['tf'].stand_in
    (tmp_path / 'checkpoints').mkdir()
    file = tmp_path / 'checkpoints' / features._INCEPTION_FILE
    file.write_bytes(b'pickle')
    with pytest.raises(ValueError, match='256'):
        features.find_extractors()
    monkeypatch.setattr(features, '_INCEPTION_SHA256', __import__('hashlib').sha256(b'pickle').hexdigest())
    assert features._find_inception() == file


def test_a_kept_reference_is_not_looked_at_again(tmp_path):
    extractor, looks = features.find_extractors()['clean'], []

    def batches():
        looks.append(1)
        return some_images(20).split(7)
    first, again = (features.reference_statistics(tmp_path, 'a', extractor, batches) for _ in range(2))
    assert (first.n, first.kept, again.n, again.kept, len(looks)) == (20, False, 20, True, 1)
    assert all(np.array_equal(getattr(first, part), getattr(again, part)) for part in ('mean', 'cov', 'rows'))
    assert len(list(tmp_path.iterdir())) == 1 and len(again.rows) == 20
    features.reference_statistics(tmp_path, 'b', extractor, batches)
    assert len(looks) == 2


def test_published_statistics_have_no_features(tmp_path):
    extractor = features.find_extractors()['tf']
    np.savez(tmp_path / f'a-{extractor.name}-tf.npz', mean=np.zeros(96), cov=np.eye(96), n=30_000)
    known = features.reference_statistics(tmp_path, 'a', extractor, lambda: 1 / 0)
    assert (known.n, known.rows, known.kept) == (30_000, None, True)


def test_the_interval_holds_the_number_and_narrows():
    rng = np.random.default_rng(0)
    reference = features.reference_of(rng.normal(size=(5000, 5)))
    few, many = (features.fid_interval(rng.normal(.3, 1, (n, 5)), reference, 30) for n in (60, 2000))
    assert few['low'] < few['fid'] < few['high'] and many['high'] - many['low'] < (few['high'] - few['low']) / 2
    rows = rng.normal(size=(50, 5))
    alone = features.fid_interval(rows, reference, 0)
    assert alone == {'fid': frechet_distance(*gaussian_statistics(rows), reference.mean, reference.cov), 'low': None, 'high': None, 'interval': ''}


def test_an_interval_of_both_sides_is_wider_and_named():
    rng = np.random.default_rng(0)
    rows, others = rng.normal(size=(80, 6)), rng.normal(.5, 2, (60, 6))
    reference = features.reference_of(others)
    known = features.Reference(reference.mean, reference.cov, reference.n)
    both, alone = (features.fid_interval(rows, side, 100) for side in (reference, known))
    assert both['fid'] == alone['fid'] and both['high'] - both['low'] > 1.2 * (alone['high'] - alone['low'])
    assert (both['interval'], alone['interval']) == ('generated and reference images drawn', 'generated images alone drawn')


def test_the_interval_agrees_with_fresh_draws():
    rng = np.random.default_rng(0)
    fresh = [features.fid_interval(rng.normal(.6, 1, (200, 3)), features.reference_of(rng.normal(size=(100, 3))), 0)['fid'] for _ in range(200)]
    found = features.fid_interval(rng.normal(.6, 1, (200, 3)), features.reference_of(rng.normal(size=(100, 3))), 200)
    assert .6 < (found['high'] - found['low']) / 2 / (1.96 * np.std(fresh)) < 1.6


def test_of_a_large_reference_some_features_are_kept():
    rows = np.random.default_rng(0).normal(size=(500, 3))
    found, whole = features.reference_of(rows, 100), features.reference_of(rows)
    assert found.n == 500 and found.rows.shape == (100, 3) and len(whole.rows) == 500 and np.array_equal(found.cov, whole.cov)
    other = rows[:200] + .5
    widths = [end['high'] - end['low'] for end in (features.fid_interval(other, side, 200) for side in (found, whole))]
    assert .7 < widths[0] / widths[1] < 1.4                                      # as many are drawn from the few as there were


def test_clip_scores_are_cosines_in_percent():
    torch.manual_seed(0)
    scorer = features.clip_scorer(None, 'ViT-S-32-alt')
    scores = scorer(some_images(2, 64, 64), ['a red star', 'a blue ring'])
    assert scores.shape == (2,) and (scores >= 0).all() and (scores <= 100).all()
    found = features.clip_summary(np.array([10., 20., 30.]), 'x')
    assert found['mean'] == 20 and found['low'] < 20 < found['high'] and found['why'] == ''


def test_the_activation_belongs_to_the_weights(tmp_path):
    pytest.importorskip('open_clip')
    assert features._clip_activation('openai', 'ViT-L-14') == features._clip_activation(str(tmp_path / 'openai.pt'), 'ViT-L-14') == 'quick_gelu'
    assert features._clip_activation('laion2b_s32b_b82k', 'ViT-L-14') == 'gelu'
    found = {}
    for activation in ('', 'quick_gelu', 'gelu'):
        torch.manual_seed(0)
        found[activation] = features.clip_scorer(None, 'ViT-S-32-alt', activation=activation)(some_images(2, 64, 64), ['a star', 'a ring'])
    assert np.array_equal(found[''], found['quick_gelu']) and not np.allclose(found['gelu'], found['quick_gelu'], rtol=1e-5)
    with pytest.raises(ValueError, match='quick_gelu'):
        features.clip_scorer(None, 'ViT-S-32-alt', activation='relu')
