"What the stages do with a batch."
import torch

from flowtok.models.layers import DiagonalGaussian
from flowtok.training.tasks import tempered_sample


def test_a_tempered_sample_has_that_share_of_the_noise():
    posterior = DiagonalGaussian(torch.full((4000, 2, 2), 3.), torch.full((4000, 2, 2), 2 * torch.tensor(.5).log()))
    assert torch.equal(tempered_sample(posterior, 0.), posterior.mean)
    for share in (.3, 1.):
        tokens = tempered_sample(posterior, share)
        assert abs(tokens.std() - .5 * share) < .01 and abs(tokens.mean() - 3) < .02
