"What the stages do with a batch."
import pytest
import torch

from flowtok.config import parse_changes
from flowtok.flow.path import Rng
from flowtok.flow.source import DiagonalGaussian
from flowtok.models.text import text_encoder
from flowtok.training.tasks import FlowStage, plan


def test_a_tempered_sample_has_that_share_of_the_noise():
    posterior = DiagonalGaussian(torch.full((4000, 2, 2), 3.), torch.full((4000, 2, 2), 2 * torch.tensor(.5).log()))
    assert torch.equal(FlowStage.noisy(posterior, 0., Rng()), posterior.mean)
    for share in (.3, 1.):
        tokens = FlowStage.noisy(posterior, share, Rng())
        assert abs(tokens.std() - .5 * share) < .01 and abs(tokens.mean() - 3) < .02


def test_length_sets_both_ends_of_the_flow():
    assert parse_changes('length=64 ema=0.9', 'text') == {'length': 64, 'ema': .9}
    for scale in ('tiny', 'small'):
        config = plan('text', scale, changes='length=64').config
        assert (config.text.length, config.tokenizer.num_tokens) == (64, 64)
    assert plan('text', 'tiny').config == plan('text', 'tiny', changes='length=16').config
    texts = [' '.join(['red'] * n) for n in (3, 15, 16, 70)]                     # and an end each
    for length, cut in ((16, .5), (64, .25)):
        assert text_encoder(plan('text', 'tiny', changes={'length': length}).config.text).cut_share(texts) == cut
    for scale, changes in (('tiny', 'length=40'), ('tiny', 'length=0'), ('xl', 'length=64'), ('tiny', 'length=many')):
        with pytest.raises(ValueError) as error:
            plan('text', scale, changes=changes)
        assert changes.split('=')[1] in str(error.value)
