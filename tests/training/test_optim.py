"Muon: the published iteration, in float32 on a CPU, all matrices of one shape at once."
import pytest
import torch
from torch import nn

from flowtok.config import recipe
from flowtok.training.optim import Muon, make_optimizers, orthogonalize


@pytest.mark.parametrize('shape', [(3, 8, 24), (3, 24, 8), (1, 16, 16)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    y = orthogonalize(x)
    assert y.shape == x.shape and y.dtype == torch.float32
    values = torch.linalg.svdvals(y)
    assert values.min() > .3 and values.max() < 1.3
    alone = torch.cat([orthogonalize(x[i:i + 1]) for i in range(len(x))])
    assert torch.allclose(y, alone, atol=1e-5)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert torch.nn.functional.cosine_similarity((u @ v).flatten(1), y.flatten(1)).min() > .95


def test_steps_are_those_of_torch_but_for_its_precision():
    if not hasattr(torch.optim, 'Muon'):
        pytest.skip('this torch has no Muon')
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(12, 32)), nn.Parameter(torch.randn(32, 12)), nn.Parameter(torch.randn(12, 32))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    optimizers = Muon(ours, 1e-2, weight_decay=.1), torch.optim.Muon(theirs, 1e-2, weight_decay=.1)
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, before in zip(ours, theirs, start):
        moved = (a - before).norm()
        assert moved > .01 and (a - b).norm() < .03 * moved


def test_what_has_no_gradient_stays():
    p = nn.Parameter(torch.ones(4, 4))
    Muon([p], .1).step()
    assert torch.equal(p, torch.ones(4, 4))


def test_the_small_recipe_uses_it_in_float32():
    how = recipe('tiny', 'text-to-image')
    layer = nn.ModuleDict({'blocks': nn.ModuleList([nn.Linear(4, 4)]), 'head': nn.Linear(4, 4)})
    muon, adamw = make_optimizers(layer, how)
    assert type(muon) is Muon and how.precision == 'fp32'
    assert [p.shape for g in muon.param_groups for p in g['params']] == [(4, 4)] and len(adamw.param_groups[0]['params']) == 3
