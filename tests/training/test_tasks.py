"What the stages do with a batch."
import torch

from flowtok.flow.source import DiagonalGaussian
from flowtok.flow.path import Rng
from flowtok.training.tasks import FlowStage


def test_a_tempered_sample_has_that_share_of_the_noise():
    posterior = DiagonalGaussian(torch.full((4000, 2, 2), 3.), torch.full((4000, 2, 2), 2 * torch.tensor(.5).log()))
    assert torch.equal(FlowStage.noisy(posterior, 0., Rng()), posterior.mean)
    for share in (.3, 1.):
        tokens = FlowStage.noisy(posterior, share, Rng())
        assert abs(tokens.std() - .5 * share) < .01 and abs(tokens.mean() - 3) < .02
