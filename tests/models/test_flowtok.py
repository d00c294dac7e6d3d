"FlowTok: the authors' numbers, the sizes, the start of training, and what the network can be asked."
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowtok.models.released import FLOWTOK_NAMES, rename
from flowtok.config import FlowConfig, FlowTokConfig, TextConfig, TokenizerConfig, preset
from flowtok.flow.path import permute_null_targets
from flowtok.config import recipe
from flowtok.flow.solver import sample, time_grid
from flowtok.flow.source import sources
from flowtok.models.layers import timestep_features
from flowtok.models.flowtok import DiT, FlowTok
from flowtok.losses.objective import alignment_loss, flow_matching_loss, total

goldens = Path(__file__).parents[1] / 'goldens' / 'flowtok_nano'


@pytest.fixture(scope='module')
def released():
    state = {rename(name, FLOWTOK_NAMES): x for name, x in load_file(goldens / 'FlowTok-nano.safetensors').items()}
    return state | {'dit.positions': state['dit.positions'][0]}


@pytest.fixture
def model(described, released):
    c = described['config']
    text = c['text_projector']
    config = FlowTokConfig('nano', TokenizerConfig(num_tokens=c['num_latent_tokens'], token_dim=c['channels']),
                           TextConfig(length=c['num_latent_tokens'], width=c['clip_dim'],
                                      projector_depth=text['num_blocks'], projector_heads=text['num_attention_heads'],
                                      projector_hidden=text['hidden_dim'], projector_dropout=text['dropout_prob'],
                                      align_hidden=c['context_projector_hidden']),
                           FlowConfig(c['depth'], c['hidden_size'], c['num_heads']))
    model = FlowTok(config)
    model.load_state_dict(released)
    return model.eval()


def agree(ours, golden, tolerance=2e-5):
    assert ours.shape == golden.shape
    error = (ours.detach() - golden).abs().max().item()
    assert error <= tolerance * max(1, golden.abs().max().item()), error


# the authors' numbers

@pytest.mark.parametrize('indicator', [0, 1])
def test_velocity(model, golden, indicator):
    expected = golden[f'velocity_indicator{indicator}']
    for asked in (indicator, bool(indicator), torch.full((3,), indicator), torch.full((3,), indicator).bool()):
        agree(model.velocity(golden['x'], golden['t'], asked), expected)


def test_parts_of_the_velocity(model, golden, described):
    dit = model.dit
    agree(timestep_features(golden['t']), golden['t_sinusoid'], described['tolerance']['t_sinusoid'])
    agree(dit.time(golden['t']), golden['t_embedding'])
    agree(DiT(model.config).positions, golden['pos_embed'])
    c = torch.nn.functional.silu(golden['block_c'])
    agree(dit.blocks[0](golden['block_in'], dit.blocks[0].modulation(c)), golden['block0_out'])
    agree(dit.final(golden['block_in'], dit.final.modulation(c)), golden['final_layer_out'])


def test_text(model, golden):
    posterior = model.source(golden['text'])
    agree(posterior.mean, golden['text_mu'])
    agree(posterior.logvar, golden['text_logvar'])
    agree(posterior.mean + posterior.std * golden['eps'], golden['text_z'])
    agree(model.alignment_target(golden['text']), golden['context_projector'])
    agree(model.projector.layers[0].norm1(golden['text_norm_in']), golden['text_norm_out'])


@pytest.mark.parametrize('n', [1, 4, 20])
def test_sampling(model, golden, described, n):
    times, steps = time_grid(n, 'released')
    agree(times, golden[f'euler{n}_t'], described['tolerance']['euler_t'])
    agree(steps, golden[f'euler{n}_dt'], described['tolerance']['euler_dt'])
    path = sample(model.velocity, golden['text_mu'][:2], num_inference_steps=n, schedule='released', return_path=True,
                  guidance_scale=described['guidance_scale'])
    agree(path[-1], golden[f'euler{n}_end'])
    if n == 20:
        agree(path[described['sampling']['20']['states_kept_after_step']], golden['euler20_states'])


def released_terms(model, golden, case):
    "The terms of the authors' loss, no dropout, with the draws of the golden."
    posterior = model.source(golden['text'])
    z = posterior.mean + posterior.std * golden['eps']
    indicator = golden[f'train_{case}_indicator']
    x1 = permute_null_targets(golden['train_x1'], indicator) + 1e-5 * z          # their sigma_min
    return {'flow': flow_matching_loss(model.velocity, z, x1, golden['train_t'], {'indicator': indicator}),
            'kl': sources['released_kl'](posterior.mean, posterior.logvar).loss(),
            'align': alignment_loss(z, model.alignment_target(golden['text']), model.temperature)}


@pytest.mark.parametrize('case', ['plain', 'null'])
def test_training_losses(model, golden, described, case):
    terms, tolerance, weights = released_terms(model, golden, case), described['tolerance'], described['loss_weights']
    agree(terms['flow'], golden[f'train_{case}_flow_mse'], tolerance['flow_mse'])
    agree(weights['kl'] * terms['kl'], golden[f'train_{case}_kl'], tolerance['kl'])
    agree(terms['align'], golden[f'train_{case}_contrastive'], tolerance['contrastive'])


@pytest.mark.parametrize('case', ['plain', 'null'])
def test_gradient_norms(model, golden, described, case):
    weights = replace(recipe('xl', 'text-to-image'), source='released_kl', kl_weight=described['loss_weights']['kl']).weights
    total(released_terms(model, golden, case), weights).backward()
    found = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.requires_grad}
    expected = {rename(k, FLOWTOK_NAMES): v for k, v in described['gradient_norms_of_mean_loss'][case].items()}
    assert set(found) == set(expected)
    relative = described['tolerance']['gradient_norm_relative']
    wrong = {k: (found[k], v) for k, v in expected.items() if abs(found[k] - v) > max(relative * v, 1e-6)}
    assert not wrong


# what the network can be asked

@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = FlowTok(preset('tiny'))
    for p in model.dit.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return model


def test_one_time_or_many(tiny):
    x, times = torch.randn(3, 16, 16), torch.full((3,), 0.25)
    expected = tiny.velocity(x, times, torch.zeros(3, dtype=torch.long))
    for t in (0.25, torch.tensor(0.25), times, times.double()):
        assert torch.allclose(tiny.velocity(x, t, 0), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(tiny.velocity(x, 0.25, 1), expected)
    assert not torch.allclose(tiny.velocity(x, 0.75, 0), expected)
    mixed = tiny.velocity(x, 0.25, torch.tensor([0, 1, 0]))
    assert torch.allclose(mixed[::2], expected[::2], rtol=1e-3, atol=1e-4) and not torch.allclose(mixed[1], expected[1])


def test_time_stays_exact_in_half_precision(tiny):
    asked = []
    tiny.bfloat16().dit.time.register_forward_pre_hook(lambda module, args: asked.append(args[0]))
    v = tiny.velocity(torch.randn(2, 16, 16).bfloat16(), torch.tensor([0.9502, 0.9504]), 0)
    assert v.dtype == torch.bfloat16 and v.isfinite().all()
    assert asked[0].dtype == torch.float32 and asked[0][0] != asked[0][1]


@pytest.mark.parametrize('shape', [(2, 16, 8), (2, 77, 16), (16, 16), (2, 16, 16, 1)])
def test_tokens_of_another_shape(tiny, shape):
    with pytest.raises(ValueError, match='16'):
        tiny.velocity(torch.zeros(shape), 0., 0)


def test_as_many_text_tokens_as_image_tokens():
    config = preset('tiny')
    with pytest.raises(ValueError) as error:
        FlowTok(replace(config, text=replace(config.text, length=20)))
    assert all(str(value) in str(error.value) for value in (20, config.tokenizer.num_tokens))


# sizes and start

@pytest.mark.parametrize('name', ['s', 'b', 'l', 'xl', 'h'])
def test_names_are_those_of_the_released_files(name, released):
    with torch.device('meta'):
        state = FlowTok(preset(name)).state_dict()
    depth = preset(name).flow.depth
    blocks = {k.replace('blocks.0.', '') for k in state if k.startswith('dit.blocks.0.')}
    assert {k for k in state if '.blocks.' not in k and '.layers.' not in k} == \
        {k for k in released if '.blocks.' not in k and '.layers.' not in k}
    assert len([k for k in state if k.startswith('dit.blocks.')]) == depth * len(blocks)
    assert {k.replace('blocks.0.', '') for k in released if k.startswith('dit.blocks.0.')} == blocks


def test_initialisation():
    torch.manual_seed(0)
    model = FlowTok(preset('tiny'))
    block = model.dit.blocks[0]
    for linear in (model.dit.embed, block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        bound = (6 / sum(linear.weight.shape))**0.5
        assert 0.95 * bound < linear.weight.abs().max() <= bound and (linear.bias == 0).all()
    for module in (model.dit.time.mlp[0], model.dit.time.mlp[2], model.dit.indicator):
        assert abs(module.weight.std() - 0.02) < 0.002
    assert all((module.bias == 0).all() for module in model.dit.time.mlp[::2])
    for module in [b.modulation for b in model.dit.blocks] + [model.dit.final.modulation, model.dit.final.linear]:
        assert (module.weight == 0).all() and (module.bias == 0).all()
    bound = model.alignment[0].in_features**-0.5                                 # what PyTorch does unasked
    assert 0.95 * bound < model.alignment[0].weight.abs().max() <= bound and model.alignment[0].bias.abs().max() > 0
    assert abs(model.temperature.exp().item() - 1 / 0.07) < 1e-4


def test_positions_are_stored_and_never_trained(tiny):
    assert 'dit.positions' in tiny.state_dict() and not tiny.dit.positions.requires_grad


def test_all_else_is_trained(tiny):
    text_features, x1 = torch.randn(4, 16, 128), torch.randn(4, 16, 16)
    source, t = tiny.source(text_features), torch.rand(4)
    x0 = source.sample(torch.randn_like(source.mean))
    flow = flow_matching_loss(tiny.velocity, x0, x1, t, {'indicator': torch.tensor([0, 1, 1, 0])}).mean()
    (flow + alignment_loss(x0, tiny.alignment_target(text_features), tiny.temperature)).backward()
    still = [name for name, p in tiny.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == ['dit.positions']
