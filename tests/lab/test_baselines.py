"Baselines: what must be equal is equal, and each is the flow that it says it is."
from dataclasses import replace
from itertools import repeat

import pytest
import torch

from flowtok.lab import baselines
from flowtok.config import preset, recipe
from flowtok.flow.path import Rng
from flowtok.flow.solver import sample
from flowtok.models.flowtok import FlowTok
from flowtok.losses.objective import text_to_image_terms
from flowtok.training.optim import cpu_has_bf16
from flowtok.models.tokenizer import ImageTokenizer

tiny = preset('tiny')
configs = {kind: baselines.grid_config(tiny) if kind == 'source 2d' else tiny for kind in baselines.KINDS}


def share(seed=0): return Rng(torch.Generator().manual_seed(seed))


def made(kind, seed=0, **changes):
    torch.manual_seed(seed)
    baseline = baselines.Baseline(kind, baselines.build_network(configs[kind], kind), replace(recipe('xl', 'text-to-image'), time_sampling='uniform', **changes))
    for p in baseline.network.parameters():                                          # leave the zeros of the beginning
        p.data += 0.02 * torch.randn(p.shape)
    baseline.network.eval()
    return baseline


def batch(kind, n=5):
    torch.manual_seed(1)
    tokens = configs[kind].tokenizer
    return torch.randn(n, 16, 128), torch.randn(n, tokens.num_tokens, tokens.token_dim)


@pytest.mark.parametrize('scale', ['tiny', 'b'])
@pytest.mark.parametrize('kind', ['source', 'cross', 'concat'])
def test_twins_have_one_size_at_every_scale(scale, kind):
    config = preset(scale)
    with torch.device('meta'):
        wanted = baselines.parameters_of(FlowTok(config))
        found = baselines.parameters_of(baselines.build_network(baselines.match(config, kind, wanted), kind))
    assert abs(found / wanted - 1) < .05


def test_no_width_is_a_sentence():
    with pytest.raises(ValueError, match='5'):
        baselines.match(tiny, 'cross', 10)


@pytest.mark.parametrize('kind', ['cross', 'concat'])
def test_a_new_conditioned_network_answers_zero(kind):
    network = baselines.build_network(tiny, kind)
    features, x = batch(kind)
    assert network.velocity(x, torch.rand(5), torch.zeros(5, dtype=torch.long), features).abs().max() == 0


@pytest.mark.parametrize('kind', ['cross', 'concat'])
def test_a_condition_is_heard_unless_it_is_null(kind):
    network, (features, x) = made(kind).network, batch(kind)
    t, other = torch.rand(5), features.flip(0)
    for indicator, heard in ((0, True), (1, False)):
        ask = torch.full((5,), indicator)
        change = (network.velocity(x, t, ask, features) - network.velocity(x, t, ask, other)).abs().amax((1, 2))
        assert (change[[0, 1, 3, 4]] > 1e-5).all() if heard else change.max() == 0


@pytest.mark.parametrize('kind', ['cross', 'concat'])
def test_samples_do_not_hear_each_other(kind):
    baseline, (features, _) = made(kind), batch(kind)
    both = baseline.draw(features, torch.Generator().manual_seed(0), 3, 2.)
    first = baseline.draw(features[:2], torch.Generator().manual_seed(0), 3, 2.)
    assert torch.allclose(both[:2], first, atol=1e-5)


def test_the_source_trains_with_flowtoks_own_terms():
    baseline, (features, x1) = made('source'), batch('source')
    ours = baseline.terms(features, x1, share())
    theirs = text_to_image_terms(baseline.network, features, x1, baseline.recipe, share())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_start_from_noise_learns_the_difference_to_the_noise():
    baseline, (features, x1) = made('concat', indicator_probability=0.), batch('concat')
    seen = {}

    def velocity(x, t, indicator, text):
        seen.update(x=x, t=t, indicator=indicator)
        x0 = (x - t[:, None, None] * x1) / (1 - t[:, None, None])
        return x1 - x0
    baseline.network.velocity = velocity
    assert baseline.terms(features, x1, share())['flow'].max() < 1e-6 and not seen['indicator'].any()


def test_the_grid_spreads_all_numbers_of_the_text_over_its_cells():
    network = made('source 2d').network
    x = torch.arange(2 * 16 * 16).view(2, 16, 16)
    assert torch.equal(network.spread(x).flatten(1), x.flatten(1)) and network.spread(x).shape == (2, 64, 4)
    uneven = replace(tiny, tokenizer=replace(tiny.tokenizer, num_tokens=9, token_dim=5, anchored=False))
    posterior = baselines.Source2d(uneven).source(batch('source')[0])
    assert posterior.mean.shape == posterior.logvar.shape == (5, 9, 5)


def test_the_grid_has_a_tokenizer():
    config = baselines.grid_config(tiny)
    tokenizer = ImageTokenizer(config).eval()
    tokens = tokenizer.encode(torch.rand(2, 3, 64, 64)).mean
    assert tokens.shape == (2, 64, 4) and tokenizer.decode(tokens).shape == (2, 3, 64, 64)


@pytest.mark.parametrize('kind', baselines.KINDS)
def test_training_is_repeatable_and_learns(kind):
    losses, weights = [], []
    for _ in range(2):
        baseline, rows, seen = made(kind), batch(kind), []
        before = baseline.terms(*rows, share(9))['flow'].mean().item()
        how = replace(recipe('tiny', 'text-to-image'), steps=12, warmup=2, precision='fp32')
        seconds = baselines.train_baseline(baseline, repeat(rows), how, 3, (6,), lambda step, at: seen.append((step, at)))
        losses.append(baseline.terms(*rows, share(9))['flow'].mean().item())
        weights.append(torch.cat([p.flatten() for p in baseline.network.parameters()]))
        assert losses[-1] < before and [step for step, _ in seen] == [6] and 0 < seen[0][1] < seconds
    assert torch.equal(*weights)


@pytest.mark.parametrize('kind', ['cross', 'concat'])
@pytest.mark.parametrize('guidance', [1., 2.])
def test_a_text_is_read_once_for_a_image(kind, guidance, monkeypatch):
    baseline, (features, x1) = made(kind), batch(kind)
    network, reads, real = baseline.network, [], baseline.network.read
    monkeypatch.setattr(network, 'read', lambda *a: reads.append(1) or real(*a))
    fast = baseline.draw(features, torch.Generator().manual_seed(0), 4, guidance)
    assert len(reads) == 1
    noise = torch.randn(x1.shape, generator=torch.Generator().manual_seed(0))
    plain = sample(lambda x, t, indicator: network.velocity(x, t, indicator, features.repeat(len(x) // 5, 1, 1)), noise,
                   num_inference_steps=4, guidance_scale=guidance)
    assert torch.allclose(fast, plain, atol=1e-6) and len(reads) == 5


@pytest.mark.parametrize('optimizer, moments', [('adamw', 2), ('muon', 1)])
def test_memory_grows_with_the_batch_and_leaves_nothing(optimizer, moments):
    baseline = made('source')
    def megabytes(n, **values):
        how = replace(recipe('tiny', 'text-to-image'), optimizer=optimizer, **values)
        return baselines.step_memory(baseline.network, lambda: baseline.terms(*batch('source', n), share())['flow'].mean(), how)
    few, many, half = megabytes(2), megabytes(40), megabytes(40, precision='bf16')
    own = (3 + moments) * 4 * baselines.parameters_of(baseline.network) / 1e6
    assert own < few < many and all(p.grad is None for p in baseline.network.parameters())
    full = megabytes(40, precision='fp32')
    assert half < full if cpu_has_bf16() else half == full


@pytest.mark.parametrize('quality, seconds', [(0, 0), (10, 5), (20, 10), (50, 17.5), (60, 20), (61, None)])
def test_the_time_to_a_quality_lies_between_the_looks(quality, seconds):
    curve = [{'seconds': s, 'right (%)': r} for s, r in ((10, 20), (20, 60), (30, 40))]
    assert baselines.seconds_to(curve, quality) == seconds
