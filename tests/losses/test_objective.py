"The objective's terms: definitions written out a second time, every ablation, and the numbers of the authors' code."
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from flowtok.flow.path import permute_null_targets
from flowtok.config import TokenizerRecipe, recipe
from flowtok.flow.path import Rng
from flowtok.flow.source import DiagonalGaussian, Source, sources
from flowtok.losses.objective import (
    alignment_loss, caption_cross_entropy, direction_loss, edge_map, flow_matching_loss, flow_terms, loss_by_time_bin, pool_target,
    reconstruction_loss, text_to_image_terms, tokenizer_terms, total)

paper, no_source = recipe('xl', 'text-to-image'), recipe('xl', 'image-to-text')
LEARNED = ('kl', 'released_kl', 'variance_kl')
goldens = Path(__file__).parents[1] / 'goldens' / 'flowtok_nano'


class Model(nn.Module):
    "The smallest thing with the methods that the objective calls; it counts the calls."

    def __init__(self, c=12, d=4):
        super().__init__()
        self.projector, self.target = nn.Linear(c, 2 * d), nn.Linear(c, d)
        self.net, self.temperature = nn.Linear(d + 2, d), nn.Parameter(torch.tensor(1.))
        self.calls = []

    def velocity(self, x, t, cond):
        self.calls.append('velocity')
        assert cond['indicator'].dtype == torch.long
        extra = torch.stack([t, cond['indicator'].to(t)], 1)[:, None].expand(-1, x.shape[1], -1)
        return self.net(torch.cat([x, extra], 2))

    def source(self, text_features, kind='kl'):
        self.calls.append('source')
        return sources[kind](*self.projector(text_features).chunk(2, -1))

    def alignment_target(self, text_features):
        self.calls.append('alignment_target')
        return self.target(text_features)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 5, 12, generator=generator), torch.randn(8, 5, 4, generator=generator)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


# the authors' numbers

def test_released_kl_is_the_authors(golden, described):
    kl = described['loss_weights']['kl'] * sources['released_kl'](golden['text_mu'], golden['text_logvar']).loss()
    for name in ('train_plain_kl', 'train_null_kl'):
        assert abs(kl - golden[name]) <= described['tolerance']['kl'] * max(1, golden[name])


def test_contrastive_is_the_authors(golden, described):
    temperature = load_file(goldens / 'FlowTok-nano.safetensors')['t2t_temperature']
    align = alignment_loss(golden['text_z'], golden['context_projector'], temperature)
    for name in ('train_plain_contrastive', 'train_null_contrastive'):
        assert abs(align - golden[name]) <= described['tolerance']['contrastive'] * max(1, golden[name])


@pytest.mark.parametrize('case', ['plain', 'null'])
def test_total_adds_up_to_the_authors_loss(golden, described, case):
    temperature = load_file(goldens / 'FlowTok-nano.safetensors')['t2t_temperature']
    terms = {'flow': golden[f'train_{case}_flow_mse'],
             'kl': sources['released_kl'](golden['text_mu'], golden['text_logvar']).loss(),
             'align': alignment_loss(golden['text_z'], golden['context_projector'], temperature)}
    loss = total(terms, replace(paper, source='released_kl', kl_weight=described['loss_weights']['kl']).weights)
    expected = golden[f'train_{case}_loss'].mean()
    assert abs(loss - expected) <= described['tolerance']['default'] * expected


def test_flow_loss_asks_at_the_authors_points(golden):
    x1 = permute_null_targets(golden['train_x1'], golden['train_null_indicator']) + 1e-5 * golden['text_z']      # their sigma_min
    asked = []
    flow_matching_loss(lambda x, t, c: asked.append((x, t, c['indicator'])) or torch.zeros_like(x), golden['text_z'], x1,
                       golden['train_t'], {'indicator': golden['train_null_indicator']})
    (x, t, indicator), = asked
    assert (x - golden['train_null_x_t']).abs().max() <= 1e-6 * golden['train_null_x_t'].abs().max()
    assert torch.equal(t, golden['train_t']) and indicator.tolist() == [1, 0, 1, 1]


# single terms

def test_flow_loss_is_zero_for_the_true_velocity(batch):
    x0, x1 = batch[1], batch[1].flip(0)
    exact = flow_matching_loss(lambda x, t, c: x1 - x0, x0, x1, torch.rand(8), {'indicator': torch.zeros(8)})
    off = flow_matching_loss(lambda x, t, c: x1 - x0 + 2, x0, x1, torch.rand(8), {'indicator': torch.zeros(8)})
    assert torch.equal(exact, torch.zeros(8)) and torch.allclose(off, torch.full((8,), 4.))


def test_kl_is_the_divergence_of_gaussians():
    mean, logvar = torch.randn(2, 3, 5, 4)
    normal = torch.distributions.Normal(0, 1)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()), normal)
    assert torch.allclose(DiagonalGaussian(mean, logvar).kl(), expected.sum((1, 2)))
    twice = [sources[kind](mean.repeat(4, 1, 1), logvar.repeat(4, 1, 1)).loss() / sources[kind](mean, logvar).loss() for kind in LEARNED]
    assert torch.allclose(torch.stack(twice), torch.tensor([1., 4., 1.]))         # the authors sum over the batch


def test_contrastive_written_out():
    z, target, tau = torch.randn(6, 5, 4), torch.randn(6, 5, 4), torch.tensor(1.3)
    scores = torch.stack([torch.stack([F.cosine_similarity(a.flatten(), b.flatten(), 0) for b in target]) for a in z])
    scores = tau.exp() * scores
    rows, columns = scores.log_softmax(1).diag().mean(), scores.log_softmax(0).diag().mean()
    assert torch.isclose(alignment_loss(z, target, tau), -(rows + columns) / 2)


def test_cosine_stops_at_the_margin():
    z = torch.randn(4, 5, 4)
    target = z.clone().requires_grad_()
    alignment_loss(z, target, torch.tensor(0.), 'cosine', margin=0.9).backward()
    assert (target.grad == 0).all()
    assert torch.isclose(alignment_loss(z, -z, torch.tensor(0.), 'cosine', margin=0.5), torch.tensor(1.5))


def test_temperature_is_learned_by_the_contrastive_loss_alone():
    z, target, tau = torch.randn(6, 5, 4), torch.randn(6, 5, 4), torch.tensor(1., requires_grad=True)
    alignment_loss(z, target, tau).backward()
    assert tau.grad != 0
    assert not alignment_loss(z, target, tau, 'cosine').requires_grad


def test_alignment_is_exact_under_autocast():
    z, target, tau = torch.randn(16, 5, 4), torch.randn(16, 5, 4), torch.tensor(4.)
    with torch.autocast('cpu', torch.bfloat16):
        inside = alignment_loss(z, target, tau)
    assert torch.equal(inside, alignment_loss(z, target, tau))


@pytest.mark.parametrize('c, d', [(768, 16), (12, 4), (10, 4)])
def test_pool_keeps_the_shape_and_the_mean(c, d):
    features = torch.randn(2, 5, c)
    pooled = pool_target(features, d)
    assert pooled.shape == (2, 5, d)
    if c % d == 0:
        assert torch.allclose(pooled, features.reshape(2, 5, d, c // d).mean(3), atol=1e-6)


# the terms of a batch

@pytest.mark.parametrize('kl_weight, align_weight, target, loss, kind', [
    (0., 0., 'mlp', 'contrastive', 'kl'), (1e-4, 1., 'mlp', 'contrastive', 'kl'), (1e-4, 1., 'pool', 'contrastive', 'released_kl'),
    (0., 1., 'pool', 'cosine', 'variance_kl'), (1e-4, 2., 'mlp', 'cosine', 'variance_kl'), (1e-4, 0., 'pool', 'cosine', 'released_kl')])
def test_every_ablation_runs(model, batch, monkeypatch, kl_weight, align_weight, target, loss, kind):
    how = replace(paper, kl_weight=kl_weight, align_weight=align_weight, align_target=target, align_loss=loss, source=kind, margin=0.8)
    real = model.source
    monkeypatch.setattr(model, 'source', lambda features: real(features, kind))
    terms = text_to_image_terms(model, *batch, how)
    assert ('kl' in terms) == (kl_weight > 0) and ('align' in terms) == (align_weight > 0)
    assert ('alignment_target' in model.calls) == (align_weight > 0 and target == 'mlp')
    value = total(terms, how.weights)
    value.backward()
    assert value.shape == () and value.isfinite()
    assert model.projector.weight.grad.abs().sum() > 0 and model.net.weight.grad.abs().sum() > 0


def test_conditions_reach_the_velocity_untouched(batch):
    seen, style = [], torch.randn(8, 3)
    model = SimpleNamespace(velocity=lambda x, t, cond: seen.append(cond) or x)
    flow_terms(model, batch[1], batch[1].flip(0), no_source, cond={'style': style})
    assert seen[0]['style'] is style and seen[0]['indicator'].shape == (8,)


def test_flow_reaches_the_projector_through_the_path_and_the_target(model, batch):
    bare = replace(paper, kl_weight=0., align_weight=0.)
    text_to_image_terms(model, *batch, bare)['flow'].mean().backward()
    assert model.projector.weight.grad.abs().sum() > 0 and model.temperature.grad is None


def test_null_samples_get_other_images(batch):
    seen = []
    x0, x1 = torch.zeros(8, 5, 4), batch[1]
    model = SimpleNamespace(velocity=lambda x, t, c: seen.append((x / t[:, None, None], c['indicator'])) or x)
    how = replace(no_source, time_sampling='uniform', indicator_probability=0.5)
    terms = flow_terms(model, x0, x1, how, Rng(torch.Generator().manual_seed(0)))
    (reached, indicator), = seen
    moved = ~torch.isclose(reached, x1, atol=1e-4).flatten(1).all(1)
    assert torch.equal(moved, terms['indicator']) and torch.equal(indicator.bool(), moved) and 2 <= moved.sum() < 8


def test_a_generator_repeats_a_step(model, batch):
    first, second = (text_to_image_terms(model, *batch, paper, Rng(torch.Generator().manual_seed(5))) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_kinds_of_source_differ_in_what_holds_the_noise():
    mean, logvar = torch.full((3, 5, 4), 2., requires_grad=True), torch.full((3, 5, 4), -3., requires_grad=True)
    pulls = {kind: torch.autograd.grad(sources[kind](mean, logvar).loss(), (mean, logvar), allow_unused=True) for kind in LEARNED}
    assert all(pull[1].lt(0).all() for pull in pulls.values())
    assert pulls['variance_kl'][0] is None and pulls['kl'][0].gt(pulls['released_kl'][0] / 3).all()


def test_a_fixed_source_has_no_kl_term_and_a_direction_term_pulls_the_mean(model, batch):
    fixed = replace(paper, source='fixed', source_std=.5, kl_weight=1e-2, direction_weight=0.5, align_weight=0.)
    terms = text_to_image_terms(model, *batch, fixed)
    assert 'kl' not in terms and fixed.weights == {'flow': 1., 'kl': 0., 'align': 0., 'direction': 0.5}
    total({'direction': terms['direction']}, {'direction': 1.}).backward()
    assert model.projector.weight.grad.abs().sum() > 0


def test_direction_loss_is_the_squared_distance_of_unit_vectors():
    x = torch.randn(6, 5, 4)
    assert direction_loss(3 * x, x) < 1e-6 and abs(direction_loss(-x, 2 * x) - 4) < 1e-5
    cosine = torch.nn.functional.cosine_similarity(x.flatten(1), x.roll(1, 0).flatten(1)).mean()
    assert abs(direction_loss(x, x.roll(1, 0)) - (2 - 2 * cosine)) < 1e-5


def test_the_level_of_noise_is_measured():
    levels = Source(torch.full((2, 5, 4), 3.), torch.full((2, 5, 4), 2 * math.log(1.5))).levels()
    assert abs(levels['source_snr'] - 2) < 1e-5 and abs(levels['source_share'] - 1 / 5) < 1e-5


def test_total_names_what_is_missing():
    terms = {'flow': torch.tensor([1., 3.]), 't': torch.zeros(2)}
    assert total(terms, {'flow': 0.5, 'kl': 0.}) == 1
    with pytest.raises(ValueError):
        total(terms, {'flow': 1., 'kl': 1.})


@pytest.mark.parametrize('arguments, named', [
    (dict(time_sampling='cosine'), 'time_sampling.*cosine.*logit_normal'),
    (dict(align_loss='mse'), 'align_loss.*mse.*contrastive'),
    (dict(align_weight=float('nan')), 'align_weight.*nan'),
    (dict(indicator_probability=2), 'indicator_probability.*2'),
])
def test_bad_choices(arguments, named):
    with pytest.raises(ValueError, match=named):
        replace(paper, **arguments)


# bins, tokenizer, captions

def test_bins_partition_the_samples():
    t = torch.cat([torch.zeros(5), torch.linspace(0, 1, 101)])
    losses = torch.rand(106)
    assert sum(loss_by_time_bin(torch.ones(106), t).values()) == 7
    edges = (0., 0.5, 1.)
    bins = loss_by_time_bin(losses, t, edges)
    assert list(bins) == ['t=0', 't<=0.5', 't<=1']
    assert abs(6 * bins['t=0'] + 50 * bins['t<=0.5'] + 50 * bins['t<=1'] - losses.sum()) < 1e-4
    assert loss_by_time_bin(losses[:1], torch.tensor([0.7]), edges) == {'t<=1': losses[0].item()}


def test_edges_are_both_sides_of_a_step():
    image = torch.zeros(2, 3, 8, 8)
    image[0, 1, :, 4:] = 0.5
    image[1, :, :, 4:] = 0.05
    edges = edge_map(image)
    assert edges.shape == (2, 1, 8, 8) and edges[0, 0, 0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0] and edges[1].sum() == 0


def test_edge_weight_counts_edges_more_and_keeps_the_mean():
    target = torch.zeros(1, 1, 8, 8)
    target[..., 4:] = 1
    at_edge, elsewhere = target.clone(), target.clone()
    at_edge[0, 0, 2, 4] = elsewhere[0, 0, 2, 6] = 0.
    assert reconstruction_loss(at_edge, target) == reconstruction_loss(elsewhere, target) == 1 / 64
    ratio = reconstruction_loss(at_edge, target, 4.) / reconstruction_loss(elsewhere, target, 4.)
    assert torch.isclose(ratio, torch.tensor(5.))
    assert torch.isclose(reconstruction_loss(target + 0.1, target, 4.), torch.tensor(0.01))


@pytest.mark.parametrize('kl_weight', [0., 1e-6])
def test_tokenizer_terms(kl_weight):
    images, told = torch.rand(2, 3, 8, 8), []
    tokenizer = SimpleNamespace(encode=lambda x: DiagonalGaussian(x + .1, torch.full_like(x, -60.)), decode=lambda tokens, features: told.append(features) or tokens)
    how = TokenizerRecipe(1, 1, kl_weight=kl_weight)
    terms = tokenizer_terms(tokenizer, images, recipe=how)
    assert torch.isclose(terms['reconstruction'], torch.tensor(0.01)) and ('kl' in terms) == (kl_weight > 0)
    assert told == [None] and total(terms, how.weights).isfinite()
    with pytest.raises(ValueError, match='edge_weight'):
        TokenizerRecipe(1, 1, edge_weight=-1.)


def test_caption_cross_entropy():
    logits, ids = torch.randn(3, 7, 20), torch.randint(1, 20, (3, 7))
    ids[:, 4:] = 0
    every = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    words = F.cross_entropy(logits[:, :4].flatten(0, 1), ids[:, :4].flatten())
    assert torch.isclose(caption_cross_entropy(logits, ids), every)
    assert torch.isclose(caption_cross_entropy(logits, ids, pad_weight=0.), words)
    assert torch.isclose(caption_cross_entropy(logits, ids, pad_id=99), every)
