"The flow's mathematics: closed forms, an independent ODE solver, and the numbers of the authors' code."
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowtok.flow.path import Rng, draw_indicator, interpolate, permute_null_targets, sample_time, time_kinds
from flowtok.flow.solver import Sampling, cfg_velocity, given_grid, guide, sample, schedules, solve, solvers, time_grid

goldens = Path(__file__).parents[1] / 'goldens' / 'flowtok_nano'


@pytest.fixture(scope='module')
def golden():
    return load_file(goldens / 'golden.safetensors')


@pytest.fixture(scope='module')
def tolerance():
    return json.loads((goldens / 'golden.json').read_text())['tolerance']


def swirl(x, t, indicator):
    "A field that depends on place, time and indicator, with no simple solution."
    t = t.reshape(-1, 1, 1)
    return torch.sin(3 * x.flip(-1) + t) + t * x + 0.3 * indicator.reshape(-1, 1, 1)


@pytest.fixture
def start():
    return torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# the authors' numbers

@pytest.mark.parametrize('n', [1, 4, 20])
def test_released_grid_is_the_authors(golden, tolerance, n):
    times, steps = time_grid(n, 'released')
    assert times.dtype == steps.dtype == torch.float32
    assert (times - golden[f'euler{n}_t']).abs().max() <= tolerance['euler_t']
    assert (steps - golden[f'euler{n}_dt']).abs().max() <= tolerance['euler_dt']


@pytest.mark.parametrize('n', [1, 4, 20])
def test_sampler_asks_at_the_released_times(golden, tolerance, n):
    asked = []

    def velocity(x, t, indicator):
        asked.append(t)
        assert indicator.tolist() == [0, 0, 1, 1] and indicator.dtype == torch.long
        return torch.ones_like(x)

    end = sample(velocity, torch.zeros(2, 77, 16), num_inference_steps=n, schedule='released')
    assert len(asked) == n and all((t == t[0]).all() for t in asked)
    assert (torch.stack(asked)[:, 0] - golden[f'euler{n}_t']).abs().max() <= tolerance['euler_t']
    assert torch.allclose(end, golden[f'euler{n}_dt'].sum().expand_as(end), atol=1e-6)


def test_exchange_and_path_are_the_authors(golden, tolerance):
    indicator, x1 = golden['train_null_indicator'], golden['train_x1']
    exchanged = permute_null_targets(x1, indicator)
    assert torch.equal(exchanged, golden['train_null_target_image'])
    x_t = interpolate(golden['text_z'], exchanged + 1e-5 * golden['text_z'], golden['train_t'])      # their sigma_min
    # a path without it is about 1e-5 away, hence tighter than the default tolerance
    assert (x_t - golden['train_null_x_t']).abs().max() <= 1e-6 * golden['train_null_x_t'].abs().max()
    assert torch.equal(permute_null_targets(x1, golden['train_plain_indicator']), x1)


# path, velocity, indicator

def test_velocity_is_the_derivative_of_the_path(start):
    x1, t = start.flip(0), torch.tensor([0., 0.3, 0.9], dtype=torch.float64)
    difference = interpolate(start, x1, t + 0.05) - interpolate(start, x1, t)
    assert torch.allclose(difference / 0.05, x1 - start)


def test_gradients_reach_both_ends(start):
    x0, x1 = start.clone().requires_grad_(), start.flip(0).requires_grad_()
    interpolate(x0, x1, torch.full((3,), 0.25)).sum().backward()
    assert torch.allclose(x0.grad, torch.full_like(start, 0.75))
    assert torch.allclose(x1.grad, torch.full_like(start, 0.25))


@pytest.mark.parametrize('flags', [[0, 0, 0, 0, 0], [0, 1, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]])
def test_exchange_permutes_the_null_targets(flags):
    x1, indicator = torch.arange(5.), torch.tensor(flags)
    exchanged = permute_null_targets(x1, indicator)
    assert sorted(exchanged.tolist()) == x1.tolist()
    assert torch.equal(exchanged[indicator == 0], x1[indicator == 0])
    if sum(flags) > 1:
        assert (exchanged != x1)[indicator == 1].all()
    assert torch.equal(x1, torch.arange(5.))


def test_indicator_is_never_alone():
    generator = torch.Generator().manual_seed(0)
    counts = {int(draw_indicator(torch.rand(6, generator=generator), 0.2).sum()) for _ in range(300)}
    assert 1 not in counts and {0, 2, 3} <= counts
    assert draw_indicator(torch.rand(4), 1.).all() and not draw_indicator(torch.rand(4), 0.).any() and not draw_indicator(torch.rand(1), 1.).any()


# time

def test_logit_normal_is_the_sigmoid_of_a_normal():
    t = sample_time(50_000, rng=Rng(torch.Generator().manual_seed(0)))
    assert abs(t.logit().mean()) < 0.02 and abs(t.logit().std() - 1) < 0.02 and 0 < t.min() and t.max() < 1


def test_mixture_puts_its_share_at_zero():
    rng = Rng(torch.Generator().manual_seed(0))
    t = sample_time(20_000, 'mixture', p_start=0.3, rng=rng)
    assert abs((t == 0).float().mean() - 0.3) < 0.02 and abs(t[t > 0].mean() - 0.5) < 0.02
    assert (sample_time(9, 'mixture', p_start=1., rng=rng) == 0).all()
    cubes = sample_time(20_000, 'mixture', p_start=0., power=3., rng=rng)
    assert abs((cubes < 0.001).float().mean() - 0.1) < 0.02 and cubes.max() <= 1      # u < 0.1


@pytest.mark.parametrize('kind', time_kinds)
def test_times_repeat_with_the_generator(kind):
    first, second = (sample_time(50, kind, rng=Rng(torch.Generator().manual_seed(3))) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (50,) and first.dtype == torch.float32


# solvers

@pytest.mark.parametrize('solver', solvers)
def test_constant_field_is_exact_in_one_step(start, solver):
    end = sample(lambda x, t, i: torch.full_like(x, 2.5), start, num_inference_steps=1, solver=solver)
    assert torch.allclose(end, start + 2.5)


@pytest.mark.parametrize('solver, order', [('euler', 1), ('midpoint', 2), ('heun', 2)])
def test_order_of_convergence(start, solver, order):
    def grow(x, t, indicator):
        return x * (1 + t.reshape(-1, 1, 1))

    exact = start * torch.tensor(1.5, dtype=torch.float64).exp()
    errors = [(sample(grow, start, num_inference_steps=n, solver=solver) - exact).abs().max() for n in (40, 80)]
    assert abs((errors[0] / errors[1]).log2() - order) < 0.1


@pytest.mark.parametrize('solver, oracle', [('euler', 'euler'), ('midpoint', 'midpoint'), ('heun', 'heun2')])
def test_solvers_agree_with_torchdiffeq(start, solver, oracle):
    odeint = pytest.importorskip('torchdiffeq').odeint
    zeros = torch.zeros(3, dtype=torch.long)
    grid = torch.linspace(0, 1, 8, dtype=torch.float64)
    expected = odeint(lambda t, x: swirl(x, t.expand(3), zeros), start, grid, method=oracle)
    path = sample(swirl, start, num_inference_steps=7, guidance_scale=1, solver=solver, return_path=True)
    assert path.shape == (8, 3, 5, 4) and torch.allclose(path, expected, atol=1e-12)


def test_guided_flow_agrees_with_an_adaptive_solver(start):
    odeint = pytest.importorskip('torchdiffeq').odeint
    zeros, ones = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)

    def field(t, x):
        return guide(swirl(x, t.expand(3), zeros), swirl(x, t.expand(3), ones), 3.)

    expected = odeint(field, start, torch.tensor([0., 1.], dtype=torch.float64), rtol=1e-9, atol=1e-9)[-1]
    end = sample(swirl, start, num_inference_steps=200, guidance_scale=3., solver='heun')
    assert torch.allclose(end, expected, atol=1e-4)


@pytest.mark.parametrize('solver', ['midpoint', 'heun'])
def test_order_on_an_uneven_grid(start, solver):
    exact = start * torch.tensor(1.5, dtype=torch.float64).exp()
    errors = [(sample(lambda x, t, i: x * (1 + t.reshape(-1, 1, 1)), start, solver=solver, times=(torch.arange(n + 1) / n).double() ** 1.5)
               - exact).abs().max() for n in (40, 80)]
    assert abs((errors[0] / errors[1]).log2() - 2) < 0.15


@pytest.mark.parametrize('solver', solvers)
def test_given_times_equal_the_uniform_ones(start, solver):
    ends = [sample(swirl, start, solver=solver, **how) for how in (dict(num_inference_steps=4), dict(times=(0., .25, .5, .75, 1.)))]
    assert torch.equal(*ends) and torch.equal(given_grid((0, .5, 1))[1], torch.full((2,), .5))


def test_a_solver_asks_for_one_velocity_twice_and_gets_it_twice(start):
    "The velocity inside a solver depends on its arguments alone: any call may be repeated, in any order."
    def field(x, t): return cfg_velocity(swirl, x, t, 3.)
    times = torch.tensor([.7, .1, .7, .4], dtype=torch.float64)
    values = [field(start, t) for t in times]
    assert torch.equal(values[0], values[2]) and not torch.equal(values[0], values[1])


# sampling

def test_guidance_only_within_its_interval(start):
    seen = []

    def velocity(x, t, indicator):
        seen.append((round(t[0].item(), 2), len(x)))
        return x

    sample(velocity, start, num_inference_steps=4, guidance_interval=(.25, .5))
    assert seen == [(0., 3), (.25, 6), (.5, 6), (.75, 3)]
    whole = sample(swirl, start, guidance_interval=(0., 1.))
    assert torch.equal(whole, sample(swirl, start)) and not torch.allclose(whole, sample(swirl, start, guidance_interval=(0., .5)))


def test_one_batch_of_two_halves_and_none_without_guidance(start):
    seen = []

    def velocity(x, t, indicator):
        seen.append((len(x), len(t), indicator.tolist()))
        return x

    sample(velocity, start, num_inference_steps=2)
    assert seen == [(6, 6, [0, 0, 0, 1, 1, 1])] * 2
    seen.clear()
    sample(velocity, start, num_inference_steps=2, guidance_scale=1)
    assert seen == [(3, 3, [0, 0, 0])] * 2


def test_guidance_scales(start):
    def ends(s):
        return sample(lambda x, t, i: 1. + i.reshape(-1, 1, 1) + 0 * x, start, guidance_scale=s) - start

    assert torch.allclose(ends(1), torch.ones_like(start)) and torch.allclose(ends(0), 2 * torch.ones_like(start))
    assert torch.allclose(ends(3), -torch.ones_like(start))


def test_sampling_computes_no_gradients(start):
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert not sample(lambda x, t, i: weight * x, start.requires_grad_()).requires_grad


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_number_format_is_kept_and_time_is_never_half(dtype):
    def velocity(x, t, indicator):
        assert x.dtype == dtype and t.dtype == torch.promote_types(dtype, torch.float32)
        return torch.full_like(x, 0.1)

    path = sample(velocity, torch.ones(2, 3, 4, dtype=dtype), num_inference_steps=50, return_path=True)
    assert path.dtype == dtype and torch.allclose(path[-1].double(), torch.tensor(1.1).double(), atol=4e-3)


def test_start_is_left_alone_and_path_ends_at_the_end(start):
    before = start.clone()
    path, end = sample(swirl, start, return_path=True), sample(swirl, start)
    assert torch.equal(start, before) and torch.equal(path[0], start) and torch.equal(path[-1], end)


@pytest.mark.parametrize('steps', [1, 3, 50])
def test_uniform_grid_is_where_the_state_is(steps):
    times, lengths = time_grid(steps, dtype=torch.float64)
    assert torch.allclose(lengths.cumsum(0) - lengths, times) and torch.isclose(lengths.sum(), torch.ones(()).double())


@pytest.mark.parametrize('arguments', [
    dict(solver='rk4'), dict(schedule='karras'), dict(schedule='released', solver='midpoint'), dict(num_inference_steps=0), dict(num_inference_steps=1.5),
    dict(guidance_scale=float('inf')), dict(times=[0., .5]), dict(times=[0., .5, .5, 1.]), dict(guidance_interval=(.6, .5))])
def test_bad_sampling_arguments(start, arguments):
    with pytest.raises(ValueError) as refused:
        sample(lambda *a: pytest.fail('the network was asked'), start, **arguments)
    assert list(arguments)[0] in str(refused.value).lower().replace(' ', '_')


def test_other_bad_arguments():
    with pytest.raises(ValueError):
        interpolate(torch.zeros(2, 77, 16), torch.zeros(2, 1, 16), torch.zeros(2))
    with pytest.raises(ValueError, match='logit_normal'):
        sample_time(3, 'cosine')
    with pytest.raises(ValueError, match='0.*1.*5'):
        sample_time(3, 'mixture', p_start=1.5)
    assert schedules == ('uniform', 'released')


@pytest.mark.parametrize('solver, steps, error', [('euler', 4000, 3e-3), ('heun', 200, 1e-4), ('midpoint', 200, 1e-4)])
def test_a_linear_flow_is_followed_back_in_closed_form(solver, steps, error):
    "v = a x + b t: x1 is known for every x0, and reversal finds x0 again."
    a, b = -.7, 1.3
    def velocity(x, t, indicator): return a * x + b * t.reshape(-1, 1)
    x0 = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x1 = x0 * math.exp(a) + b * (math.exp(a) - 1 - a) / a**2
    how = dict(num_inference_steps=steps, solver=solver, guidance_scale=1)
    assert torch.allclose(sample(velocity, x0, **how), x1, atol=error) and torch.allclose(sample(velocity, x1, reverse=True, **how), x0, atol=error)
    path = sample(velocity, x1, reverse=True, return_path=True, **how)
    assert torch.equal(path[0], x1) and len(path) == steps + 1 and torch.allclose(path[-1], x0, atol=error)


def test_reversal_takes_the_same_steps_backwards():
    seen = []
    def velocity(x, t, indicator):
        seen.append(round(t.flatten()[0].item(), 6))
        return torch.ones_like(x)
    for how in (dict(num_inference_steps=4), dict(times=(0, .1, .5, 1))):
        end = sample(velocity, torch.ones(2, 3), guidance_scale=1, reverse=True, **how)
        assert torch.allclose(end, torch.zeros(2, 3), atol=1e-6)
    assert seen == [1, .75, .5, .25, 1, .5, .1]
    with pytest.raises(ValueError, match='released'):
        sample(velocity, torch.ones(2, 3), schedule='released', reverse=True)


def test_the_shipped_flow_goes_back_to_the_text_it_came_from():
    from flowtok.pipeline import FlowTokPipeline
    pipe = FlowTokPipeline.from_pretrained()
    source = pipe.text_to_image.source(pipe.text_encoder(pipe.text_encoder.tokenize(['a blue star', 'a red ring', 'two green bars', 'a large yellow cross'])))
    mean, errors = source.mean, []
    x0 = source.sample(torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)))
    for steps in (10, 40):
        how = Sampling(steps, guidance_scale=1., solver='heun')
        back = pipe.text_to_image.generate(pipe.text_to_image.generate(x0, how), how, reverse=True)
        errors.append(((back - x0).square().mean() / x0.square().mean()).sqrt().item())
    assert errors[1] < errors[0] / 2 and errors[1] < .1, errors
    own = torch.cdist(back.flatten(1), mean.flatten(1)).argmin(1)
    assert own.tolist() == [0, 1, 2, 3]                          # and lands at its own caption


def test_a_field_is_told_the_end_of_each_step_and_a_caller_the_states():
    told, states = [], []
    grid = Sampling(times=(0., .25, 1.)).grid()
    end = solve(lambda x, t, s: told.append((t.item(), s.item())) or torch.ones_like(x), torch.zeros(2, 3), grid, on_step=lambda i, x: states.append((i, x)))
    assert told == [(0., .25), (.25, 1.)] and [i for i, _ in states] == [0, 1] and torch.equal(states[-1][1], end)


def test_the_scale_of_guidance_is_that_of_its_interval():
    how = Sampling(guidance_scale=3., guidance_interval=(0., .2))
    times = torch.tensor([0., .1, .2, .3, 1.])
    assert how.scale(times).tolist() == [3., 3., 3., 1., 1.] and [how.scale(t) for t in times] == [3., 3., 3., 1., 1.]
    cond, null = torch.randn(2, 5, 4, 2)
    mixed = guide(cond, null, how.scale(times))
    assert torch.equal(mixed[:3], guide(cond, null, 3.)[:3]) and torch.equal(mixed[3:], cond[3:])
