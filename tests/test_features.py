"Features for FID: the two ways to resize, Inception layer by layer, kept references, the CLIP score."
import numpy as np
import pytest
import torch
from PIL import Image

from flowtok import features
from flowtok.metrics import frechet_distance, gaussian_statistics


def pictures(n=3, h=40, w=56, seed=0):
    return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(seed))


def test_clean_is_pillows_bicubic_in_floating_point():
    images = pictures()
    small = features.resize_clean(images, 30)
    plane = (255 * images[1, 2]).round().numpy().astype(np.float32)
    assert np.array_equal(small[1, 2].numpy(), np.asarray(Image.fromarray(plane).resize((30, 30), Image.Resampling.BICUBIC)).clip(0, 255))
    assert small.min() >= 0 and small.max() <= 255 and not torch.equal(small, small.round())


def test_both_ways_leave_a_picture_of_the_right_size_alone():
    images = pictures(h=30, w=30)
    for resize in features.RESIZES.values():
        assert torch.allclose(resize(images, 30), (255 * images).round())


def test_tf_takes_every_fourth_pixel():
    images = pictures(h=64, w=64)
    assert torch.allclose(features.resize_tf(images, 16), (255 * images).round()[:, :, ::4, ::4])


@pytest.fixture
def network(tmp_path, monkeypatch):
    "Inception with random weights, through the loader."
    extractor = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3').FeatureExtractorInceptionV3
    monkeypatch.setattr(extractor, 'load_state_dict', lambda self, state: None)
    torch.save({}, tmp_path / 'weights.pth')
    torch.manual_seed(0)
    return features.load_inception(tmp_path / 'weights.pth')


def test_features_are_torch_fidelitys(network):
    images = pictures(2, 80, 80)
    expected, = network((255 * images).round().to(torch.uint8))
    found = features.inception_features(network, features.resize_tf(images))
    assert found.shape == (2, 2048) and np.allclose(found, expected.numpy(), rtol=1e-3, atol=0)
    clean = features.inception_features(network, features.resize_clean(images))
    assert clean.shape == (2, 2048) and not np.allclose(clean, found, rtol=1e-2, atol=0)


def test_other_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(features.torch.hub, 'get_dir', lambda: str(tmp_path))
    assert features.find_inception() is None and features.find_extractors()['tf'].stand_in
    (tmp_path / 'checkpoints').mkdir()
    file = tmp_path / 'checkpoints' / features.INCEPTION_FILE
    file.write_bytes(b'pickle')
    with pytest.raises(ValueError, match='SHA-256'):
        features.find_extractors()
    monkeypatch.setattr(features, 'INCEPTION_SHA256', __import__('hashlib').sha256(b'pickle').hexdigest())
    assert features.find_inception() == file


def test_a_kept_reference_is_not_looked_at_again(tmp_path):
    extractor, looks = features.find_extractors()['clean'], []

    def batches():
        looks.append(1)
        return pictures(20).split(7)
    mean, cov, n, kept = features.reference_statistics(tmp_path, 'a', extractor, batches)
    again = features.reference_statistics(tmp_path, 'a', extractor, batches)
    assert (n, kept, again[2:], len(looks)) == (20, False, (20, True), 1)
    assert np.array_equal(mean, again[0]) and np.array_equal(cov, again[1]) and len(list(tmp_path.iterdir())) == 1
    features.reference_statistics(tmp_path, 'b', extractor, batches)
    assert len(looks) == 2


def test_the_interval_holds_the_number_and_narrows():
    rng = np.random.default_rng(0)
    mean, cov = gaussian_statistics(rng.normal(size=(500, 5)))
    few, many = (features.fid_interval(rng.normal(.3, 1, (n, 5)), mean, cov, 30) for n in (60, 2000))
    assert few['low'] < few['fid'] < few['high'] and many['high'] - many['low'] < (few['high'] - few['low']) / 2
    rows = rng.normal(size=(50, 5))
    alone = features.fid_interval(rows, mean, cov, 0)
    assert alone == {'fid': frechet_distance(*gaussian_statistics(rows), mean, cov), 'low': None, 'high': None}


def test_clip_scores_are_cosines_in_percent():
    torch.manual_seed(0)
    scorer = features.clip_scorer(None, 'ViT-S-32-alt')
    scores = scorer(pictures(2, 64, 64), ['a red star', 'a blue ring'])
    assert scores.shape == (2,) and (scores >= 0).all() and (scores <= 100).all()
    found = features.clip_summary(np.array([10., 20., 30.]), 'x')
    assert found['mean'] == 20 and found['low'] < 20 < found['high'] and found['why'] == ''
