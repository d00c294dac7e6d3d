"Average velocities: closed forms, derivatives against differences, and a toy that learns both ways."
import math

import pytest
import torch
from torch import nn

from three_captions import CAPTION_CENTRES, IMAGE_CENTRES, ThreeCaptions

from flowtok.flow.flow_map import adaptive_loss, consistency_target, flow_map_targets, mean_flow_target, sample_time_pairs, shortcut_target
from flowtok.flow.path import Rng
from flowtok.flow.solver import Sampling, sample, solve

RATE = -1.5


def follow(u, x, steps=1, reverse=False, times=None, **how):
    "Steps of a flow map."
    grid = Sampling(steps, times=times).grid(reverse, x.dtype)
    return solve(lambda x, t, s: u(x, t.expand(len(x)), s.expand(len(x))), x, grid, **how)


def field(x, t): return RATE * x


def average(x, t, s):
    z = (RATE * (s - t)).reshape(-1, 1, 1)
    return RATE * x * torch.where(z.abs() > 1e-9, torch.expm1(z) / torch.where(z == 0, 1., z), 1.)


@pytest.fixture
def points(): return torch.randn(6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


PAIRS = {'forward': ([0., 0., .2, .5, .9, 0.], [1., .5, .4, 1., 1., .05]), 'back': ([1., 1., .7, .5, .2, .1], [0., .5, .2, 0., .1, 0.]), 'nowhere': ([0., .1, .3, .5, .9, 1.],) * 2}


@pytest.mark.parametrize('pairs', PAIRS)
def test_the_exact_average_velocity_is_its_own_target(points, pairs):
    t, s = (torch.tensor(times, dtype=torch.float64) for times in PAIRS[pairs])
    exact = average(points, t, s)
    assert torch.allclose(mean_flow_target(average, field, points, t, s), exact, atol=1e-5)
    assert torch.allclose(shortcut_target(average, field, points, t, s, step=1e-4), exact, atol=1e-5)
    errors = [(consistency_target(average, field, points, t, s, step) - exact).abs().max() for step in (.02, .01, 1e-4)]
    assert errors[2] < 1e-5 and (pairs == 'nowhere' or 3 < errors[0] / errors[1] < 5)     # of second order in the teacher's step


@pytest.mark.parametrize('steps', [1, 3, 8])
def test_steps_of_the_flow_map_end_where_the_flow_does_and_return(points, steps):
    states = []
    end = follow(average, points, steps, on_step=lambda i, x: states.append(x))
    assert torch.allclose(end, math.exp(RATE) * points, atol=1e-6)
    assert torch.allclose(follow(average, end, steps, reverse=True), points, atol=1e-6)
    assert torch.allclose(follow(average, points, times=(0, .3, 1)), end, atol=1e-6)
    assert len(states) == steps and torch.equal(states[-1], end)


def test_the_derivative_is_that_of_finite_differences(points):
    def u(x, t, s): return torch.sin(3 * x * (t + 2 * s).reshape(-1, 1, 1)) + x.flip(-1) * (t * s).reshape(-1, 1, 1)
    def v(x, t): return torch.cos(x) + t.reshape(-1, 1, 1)
    t, s, h = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64), 1e-6
    ends = [u(points + sign * h * v(points, t), t + sign * h, s) for sign in (1, -1)]
    expected = v(points, t) + (s - t).reshape(-1, 1, 1) * (ends[0] - ends[1]) / (2 * h)
    assert torch.allclose(mean_flow_target(u, v, points, t, s), expected, atol=1e-8)


def test_the_derivative_goes_through_attention():
    from flowtok.config import FlowConfig, preset
    from flowtok.models.flowtok import FlowTok
    from dataclasses import replace
    model = FlowTok(replace(preset('tiny'), flow=FlowConfig(2, 32, 4, flow_map=True))).double()
    for p in model.dit.parameters():
        nn.init.normal_(p, std=.2) if p.requires_grad else None
    x, t, s = torch.randn(3, 16, 16, dtype=torch.float64), torch.tensor([.1, .6, .9], dtype=torch.float64), torch.tensor([.8, .2, 1.], dtype=torch.float64)

    def u(x, t, s): return model.dit(x, t, {'indicator': torch.zeros(3, dtype=torch.long)}, s)
    def v(x, t): return torch.ones_like(x)
    h = 1e-3                                                                     # times are float32 on their way to the waves
    ends = [u(x + sign * h, t + sign * h, s).detach() for sign in (1, -1)]
    expected = 1 + (s - t).reshape(-1, 1, 1) * (ends[0] - ends[1]) / (2 * h)
    got = mean_flow_target(u, v, x, t, s)
    assert (got - expected).abs().max() < 1e-2 * (expected - 1).abs().max()


def test_pairs_of_times_are_ordered_and_frequent_where_samplers_step():
    t, s = sample_time_pairs(20_000, Rng(torch.Generator().manual_seed(0)), p_start=.4, p_end=.5, p_equal=.2)
    assert (t <= s).all() and t.min() >= 0 and s.max() <= 1
    assert abs((t == 0).float().mean() - .4) < .02 and abs((t == s).float().mean() - .2) < .02 and abs((s == 1).float().mean() - .4) < .02
    error = torch.tensor([0., 1., 100.])
    assert torch.allclose(adaptive_loss(error), error / (error + 1))


@pytest.mark.parametrize('target', flow_map_targets)
def test_a_toy_learns_both_directions(target):
    "In less than a minute: fewer steps than Euler's to the images, and captions back from them, by the same weights."
    torch.manual_seed(0)
    exact = ThreeCaptions(CAPTION_CENTRES, IMAGE_CENTRES, s0=.4, s1=.25)
    net = nn.Sequential(nn.Linear(7, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))

    def u(x, t, s): return net(torch.cat([x, torch.stack([t, s, s - t, (3 * t).sin(), (3 * s).sin()], 1)], 1))
    def v(x, t): return exact(x, t, torch.zeros(len(x), dtype=torch.long))
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 700)
    for _ in range(700):
        own = torch.randint(3, (256,))
        x0, x1 = CAPTION_CENTRES[own] + .4 * torch.randn(256, 2), IMAGE_CENTRES[own] + .25 * torch.randn(256, 2)
        t, s = sample_time_pairs(256)
        back = torch.rand(256) < .4
        t, s = torch.where(back, s, t), torch.where(back, t, s)
        x = torch.lerp(x0, x1, t[:, None])
        loss = adaptive_loss((u(x, t, s) - flow_map_targets[target](u, v, x, t, s)).square().mean(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.)
        optimizer.step()
        schedule.step()
    label = torch.arange(3).repeat_interleave(100)
    x0, x1 = CAPTION_CENTRES[label] + .4 * torch.randn(300, 2), IMAGE_CENTRES[label] + .25 * torch.randn(300, 2)
    true = sample(exact, x0, guidance_scale=1, num_inference_steps=100, solver='heun')

    def miss(x): return (x - true).norm(dim=1).mean()
    assert miss(follow(u, x0)) < .9 * miss(sample(exact, x0, guidance_scale=1, num_inference_steps=1))
    for steps in (1, 4):
        found = torch.cdist(follow(u, x1, steps, reverse=True), CAPTION_CENTRES).argmin(1)
        assert (found == label).float().mean() > .8
    assert follow(u, x0).shape == x0.shape
