"The bricks: rotations, Gaussians, attention and modulated blocks against their formulas written out a second time."
import math

import pytest
import torch
import torch.nn.functional as F

from flowtok.models.layers import (
    MLP, Attention, Block, FinalLayer, ModulatedBlock, RotaryTables, SwiGLU, TimeEmbedding, apply_rope,
    grid_coordinates, modulate, rope_angles, sinusoid_positions, timestep_features)
from flowtok.flow.path import Rng
from flowtok.flow.source import DiagonalGaussian


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def test_gaussian_against_torch():
    q = DiagonalGaussian.from_moments(torch.randn(3, 5, 8))
    assert q.mean.shape == q.logvar.shape == (3, 5, 4)
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(q.mean, q.std), normal(0., 1.)).sum((1, 2))
    assert torch.allclose(q.kl(), wanted, atol=1e-5)


def test_gaussian_clamps_only_when_asked():
    moments = torch.tensor([[[0., 0., -100., 100.]]])
    assert torch.equal(DiagonalGaussian.from_moments(moments).logvar, moments[..., 2:])
    assert DiagonalGaussian.from_moments(moments, (-30., 20.)).logvar.tolist() == [[[-30., 20.]]]


@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_draws_depend_on_the_generator_alone(dtype):
    q = DiagonalGaussian(torch.zeros(2, 3, 4, dtype=dtype), torch.zeros(2, 3, 4, dtype=dtype))
    z = q.sample(Rng(torch.Generator().manual_seed(3)).like(q.mean))
    assert z.dtype == dtype
    assert torch.equal(z, torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3)).to(dtype))
    assert not torch.equal(q.sample(Rng().like(q.mean)), q.sample(Rng().like(q.mean))) and torch.equal(q.sample(z, 0.), q.mean)


def test_grid_is_row_by_row():
    assert grid_coordinates(2, 3).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize('head_dim, theta', ((4, 10.), (8, 10000.), (12, 10000.), (20, 100.), (64, 10000.)))
def test_rope_tables_entry_by_entry(head_dim, theta):
    places = torch.tensor([[0., 0.], [1., 2.], [-3., 7.25]], dtype=torch.float64)
    cos, sin = rope_angles(places, head_dim, theta)
    assert cos.shape == sin.shape == (3, head_dim) and cos.dtype == torch.float32
    m = head_dim // 2
    for row, place in enumerate(places.tolist()):
        for i in range(head_dim):
            angle = place[i // m] * theta ** (-2 * (i % m // 2) / m)
            assert math.isclose(cos[row, i], math.cos(angle), abs_tol=1e-6)
            assert math.isclose(sin[row, i], math.sin(angle), abs_tol=1e-6)


def test_rope_product_depends_on_the_offset_alone():
    q, k = torch.randn(2, 1, 1, 1, 16)
    def product(a, b):
        turn = [apply_rope(x, *rope_angles(torch.tensor([place]), 16, 10.)) for x, place in ((q, a), (k, b))]
        return (turn[0] * turn[1]).sum().item()
    assert math.isclose(product((1., 2.), (4., 0.)), product((11.5, -2.), (14.5, -4.)), abs_tol=1e-4)
    assert not math.isclose(product((1., 2.), (4., 0.)), product((1., 2.), (4., 1.)), abs_tol=1e-3)


def test_rope_turns_the_first_tokens_only():
    x = torch.randn(2, 3, 7, 8)
    y = apply_rope(x, *rope_angles(grid_coordinates(2, 2) + 1, 8))
    assert torch.equal(y[:, :, 4:], x[:, :, 4:]) and not torch.isclose(y[:, :, :4], x[:, :, :4]).all(-1).any()
    half = x.bfloat16()
    assert apply_rope(half, *rope_angles(grid_coordinates(2, 2), 8)).dtype == torch.bfloat16


def test_tables_follow_the_grid_and_the_device():
    tables = RotaryTables(8, 10., 4, 4)
    kept = tables.cos
    assert tables(4, 4, torch.device('cpu'))[0] is kept
    assert torch.equal(tables(2, 6, torch.device('cpu'))[0], rope_angles(grid_coordinates(2, 6), 8, 10.)[0])
    assert torch.equal(tables(4, 4, torch.device('cpu'))[0], kept)
    assert tables(4, 4, torch.device('meta'))[0].device.type == 'meta'
    with torch.device('meta'):
        assert torch.equal(RotaryTables(8, 10., 4, 4).cos, kept)                 # no weights, so never without values


def test_tables_made_while_sampling_serve_training():
    tables, x = RotaryTables(8, 10., 4, 4), torch.randn(1, 1, 4, 8, requires_grad=True)
    with torch.inference_mode():
        tables(2, 2, torch.device('cpu'))
    apply_rope(x, *tables(2, 2, torch.device('cpu'))).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize('rope', (None, rope_angles(grid_coordinates(2, 2), 8)))
def test_attention_by_hand(rope):
    layer, x = Attention(24, 3), torch.randn(2, 6, 24)
    out = []
    for sample in x:
        q, k, v = (sample @ layer.qkv.weight.T + layer.qkv.bias).split(24, 1)
        heads = []
        for h in range(3):
            a, b, c = (y[:, 8 * h:8 * h + 8] for y in (q, k, v))
            if rope:
                a, b = (apply_rope(y[None, None], *rope)[0, 0] for y in (a, b))
            heads.append((a @ b.T / math.sqrt(8)).softmax(1) @ c)
        out.append(torch.cat(heads, 1) @ layer.proj.weight.T + layer.proj.bias)
    assert torch.allclose(layer(x, rope), torch.stack(out), atol=1e-6)


@pytest.mark.parametrize('width, hidden', ((768, 2048), (1024, 2730), (128, 341), (80, 213), (40, 106), (32, 85)))
def test_swiglu_by_hand(width, hidden):
    layer, x = SwiGLU(width), torch.randn(2, 3, width)
    y = x @ layer.w12.weight.T + layer.w12.bias
    assert layer.w3.weight.shape == (width, hidden)
    gate, value = y[..., :hidden], y[..., hidden:]
    wanted = (gate * gate.sigmoid() * value) @ layer.w3.weight.T + layer.w3.bias
    assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_gelus():
    x = torch.randn(4, 16)
    exact, close = MLP(16), MLP(16, 'tanh')
    close.load_state_dict(exact.state_dict())
    h = exact.fc1(x)
    assert torch.allclose(exact(x), exact.fc2(h * 0.5 * (1 + torch.erf(h / 2**0.5))), atol=1e-6)
    tanh = 0.5 * h * (1 + torch.tanh((2 / math.pi)**0.5 * (h + 0.044715 * h**3)))
    assert torch.allclose(close(x), close.fc2(tanh), atol=1e-6)


@pytest.mark.parametrize('mlp, kind', (('swiglu', SwiGLU), ('gelu', MLP)))
def test_block_is_pre_norm(mlp, kind):
    block, x = Block(16, 2, mlp), torch.randn(2, 5, 16)
    y = x + block.attn(F.layer_norm(x, (16,)))
    assert isinstance(block.mlp, kind)
    assert torch.allclose(block(x), y + block.mlp(F.layer_norm(y, (16,))), atol=1e-5)


def test_time_features_entry_by_entry():
    t = torch.tensor([0., 0.3, 1.])
    features = timestep_features(t)
    assert features.shape == (3, 256)
    for row, time in enumerate(t.tolist()):
        for j in range(128):
            f = math.exp(-math.log(10000) * j / 128)
            assert math.isclose(features[row, j], math.cos(time * f), abs_tol=1e-6)
            assert math.isclose(features[row, 128 + j], math.sin(time * f), abs_tol=1e-6)


def test_time_embedding_takes_the_format_of_its_weights():
    t = torch.rand(3)
    layer = TimeEmbedding(32)
    wanted = layer.mlp[2](F.silu(layer.mlp[0](timestep_features(t))))
    assert torch.equal(layer(t), wanted)
    assert layer.bfloat16()(t).dtype == torch.bfloat16


def test_positions_entry_by_entry():
    table = sinusoid_positions(5, 12)
    for p in range(5):
        for j in range(6):
            angle = p * 10000 ** (-j / 6)
            assert math.isclose(table[p, j], math.sin(angle), abs_tol=1e-6)
            assert math.isclose(table[p, 6 + j], math.cos(angle), abs_tol=1e-6)


def test_modulated_block_by_hand():
    block, x, c = ModulatedBlock(16, 2), torch.randn(2, 5, 16), torch.randn(2, 16)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.modulation(c * c.sigmoid())[:, None].split(16, -1)
    y = x + gate_a * block.attn(F.layer_norm(x, (16,), eps=1e-6) * (1 + scale_a) + shift_a)
    y = y + gate_m * block.mlp(F.layer_norm(y, (16,), eps=1e-6) * (1 + scale_m) + shift_m)
    modulation = block.modulation(F.silu(c))
    assert torch.allclose(block(x, modulation), y, atol=1e-5)
    assert torch.allclose(block(torch.cat([x[:1], x[:1], x[1:], x[1:]]), modulation)[::2], y, atol=1e-5)      # a row for each group of samples
    assert block.mlp.approximate == 'tanh'


def test_final_layer_by_hand():
    final, x, c = FinalLayer(16, 4), torch.randn(2, 5, 16), torch.randn(2, 16)
    shift, scale = final.modulation(F.silu(c)).split(16, 1)
    wanted = final.linear(modulate(F.layer_norm(x, (16,), eps=1e-6), shift, scale))
    assert torch.allclose(final(x, final.modulation(F.silu(c))), wanted, atol=1e-6)
