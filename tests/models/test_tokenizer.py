"The image tokenizer: the numbers of the authors' code, exact sizes, every resolution, and what it refuses."
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowtok.models.released import rename, tokenizer_names
from flowtok.config import FlowTokConfig, TextConfig, TokenizerConfig, preset
from flowtok.models.layers import apply_rope
from flowtok.flow.source import DiagonalGaussian
from flowtok.models.tokenizer import ImageTokenizer, _anchored_coordinates, _cell_means, _cut_patches, join_patches

goldens = Path(__file__).parents[1] / 'goldens'
names = 'flowtitok_nano64', 'flowtitok_nano128', 'tatitok_nano64'


def ours(released):
    "A released state dict under our names and shapes, without the rotary tables, which follow from the sizes."
    state, names = {}, tokenizer_names('learned' if 'encoder.class_embedding' in released else 'rope')
    for key, value in released.items():
        if 'freqs' in key:
            continue
        key = rename(key, names)
        state[key] = value.squeeze() if 'to_moments' in key or 'to_pixels' in key else value     # 1 x 1 convolutions
    return state


class Golden:
    "One folder of goldens: our tokenizer with the authors' weights, their tensors, and the comparison."

    def __init__(self, name):
        described = json.loads((goldens / name / 'golden.json').read_text())
        c, self.tolerance = described['config'], described['tolerance']
        e, d = c['encoder'], c['decoder']
        self.tensors = load_file(goldens / name / 'golden.safetensors')
        weights = next(p for p in sorted((goldens / name).iterdir()) if p.suffix == '.bin' or 'golden' not in p.name
                       and p.suffix == '.safetensors')
        self.released = torch.load(weights, weights_only=True) if weights.suffix == '.bin' else load_file(weights)
        self.model = ImageTokenizer(FlowTokConfig(
            name, TokenizerConfig(c['image_size'], e['patch_size'], c['num_latent_tokens'], c['token_size'], e['width'],
                                  e['num_layers'], e['num_heads'], d['width'], d['num_layers'], d['num_heads'],
                                  'learned' if 'tatitok' in name else 'rope'),
            TextConfig(length=c['text_context_length'], width=c['text_embed_dim'], projector_heads=4))).eval()
        state = ours(self.released)
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected and sorted(missing) == ['token_mean', 'token_scale']
        self.model.requires_grad_(False)

    def close(self, key, value, kind='default'):
        wanted = self.tensors[key]
        assert value.shape == wanted.shape
        assert (value - wanted).abs().max() <= self.tolerance[kind] * max(1, wanted.abs().max())


@pytest.fixture(scope='module', params=names)
def golden(request):
    return Golden(request.param)


def released_layout(tokens): return tokens.transpose(1, 2)[:, :, None]           # (b, k, d) -> (b, d, 1, k)
def our_layout(latents): return latents.squeeze(2).transpose(1, 2)


def test_encode_equals_the_authors(golden):
    model, t = golden.model, golden.tensors
    images = t['image_u8'].float() / 255
    golden.close('encoder_out', released_layout(model.encoder(images, model.latent_tokens)))
    q = model.encode(images)
    golden.close('mean', released_layout(q.mean))
    golden.close('logvar', released_layout(q.logvar))
    golden.close('sample', released_layout(q.mean + q.std * our_layout(t['eps'])))
    b, k, d = q.mean.shape
    each = DiagonalGaussian(q.mean.reshape(b * k, 1, d), q.logvar.reshape(b * k, 1, d))
    golden.close('kl_per_token', each.kl().view(b, k), 'kl')
    golden.close('flow_tokens_from_mean', model.to_flow(q.mean))


def test_decode_equals_the_authors(golden):
    model, t = golden.model, golden.tensors
    rows = t['decoded'].shape[2] // model.config.patch_size
    latents = our_layout(t['latents'])
    golden.close('decoded', model.decoder(latents, t['text'], rows, rows))
    assert torch.equal(model.decode(latents, t['text']), model.train().decode(latents, t['text']).clamp(0, 1))
    model.eval()


def test_one_block_equals_the_authors(golden):
    model, t = golden.model, golden.tensors
    rope = None
    if model.config.positions == 'rope':
        tables = model.encoder.grid.tables
        rope = tables.cos, tables.sin
    golden.close('encoder_block0_out', model.encoder.blocks[0](t['encoder_block_in'], rope))


def test_logvar_is_clamped_as_the_authors_do(golden):
    q = DiagonalGaussian.from_moments(our_layout(golden.tensors['moments_extreme']), (-30., 20.))
    golden.close('moments_extreme_logvar', released_layout(q.logvar))
    golden.close('moments_extreme_std', released_layout(q.std))


@pytest.mark.parametrize('name', names[:2])
@pytest.mark.parametrize('side', ('encoder', 'decoder'))
def test_rope_equals_the_authors(name, side):
    g = Golden(name)
    tables = getattr(g.model, side).grid.tables
    for part in ('cos', 'sin'):
        g.close(f'{side}_rope_{part}', getattr(tables, part), 'rope_tables')
        released = g.released[f'{side}.positional_embedding.freqs_{part}']
        assert (getattr(tables, part) - released).abs().max() <= g.tolerance['rope_tables']
    g.close(f'{side}_rope_out', apply_rope(g.tensors[f'{side}_rope_in'], tables.cos, tables.sin))


def count(module): return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize('size', (256, 512))
def test_size_of_the_papers_tokenizer(size):
    c = preset('b')
    with torch.device('meta'):
        model = ImageTokenizer(replace(c, tokenizer=replace(c.tokenizer, image_size=size)))
    assert count(model) == 389_851_220
    assert (count(model.encoder), count(model.decoder)) == (85_744_160, 304_047_924)
    assert model.latent_tokens.numel() == 59_136


@pytest.mark.parametrize('tokens, encoder, total', ((32, (768, 12, 12), 390_202_484), (64, (768, 12, 12), 390_284_404),
                                                    (128, (512, 8, 8), 330_275_188)))
def test_size_of_ta_titok(tokens, encoder, total):
    width, depth, heads = encoder
    c = TokenizerConfig(num_tokens=tokens, encoder_width=width, encoder_depth=depth, encoder_heads=heads,
                        positions='learned')
    with torch.device('meta'):
        assert count(ImageTokenizer(FlowTokConfig('ta', c))) == total


def small(**changes):
    "A tokenizer of a moment: 4 tokens for 4 x 4 patches."
    sizes = dict(image_size=32, patch_size=8, num_tokens=4, token_dim=6, encoder_width=24, encoder_depth=2,
                 encoder_heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2)
    c = TokenizerConfig(**sizes | changes)
    torch.manual_seed(0)
    return ImageTokenizer(FlowTokConfig('small', c, TextConfig(length=5, width=12, projector_heads=2)))


kinds = pytest.mark.parametrize('changes', ({}, {'positions': 'learned'}, {'anchored': True}),
                                ids=('rope', 'learned', 'anchored'))


@kinds
def test_gradients_reach_every_parameter(changes):
    model = small(**changes)
    q = model.encode(torch.rand(2, 3, 32, 32))
    images = model.decode(q.sample(torch.randn_like(q.mean)), torch.randn(2, 5, 12))
    ((images - 0.5)**2).mean().add(q.kl().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())


@kinds
def test_samples_of_a_batch_do_not_mix(changes):
    model, images = small(**changes).double().eval(), torch.rand(3, 3, 32, 32).double()
    together, alone = model.encode(images).mean, torch.cat([model.encode(x[None]).mean for x in images])
    assert torch.allclose(together, alone)
    assert torch.allclose(model.decode(together), torch.cat([model.decode(x[None]) for x in together]))


@kinds
def test_state_dict_round_trip(changes):
    a, b = small(**changes).eval(), small(**changes).eval()
    torch.nn.init.normal_(b.latent_tokens)
    b.load_state_dict(a.state_dict())
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(a.encode(images).mean, b.encode(images).mean)
    assert not any('cos' in key or 'sin' in key for key in a.state_dict())


@pytest.mark.parametrize('anchored', (False, True))
def test_other_sizes_with_the_same_weights(anchored):
    model = small(anchored=anchored).eval()
    native = torch.rand(2, 3, 32, 32)
    before = model.encode(native).mean
    tokens = model.encode(torch.rand(2, 3, 64, 48)).mean
    assert tokens.shape == (2, 4, 6) and model.decode(tokens, size=(64, 48)).shape == (2, 3, 64, 48)
    assert torch.equal(model.encode(native).mean, before)
    big = small(anchored=anchored, image_size=64).eval()
    big.load_state_dict(model.state_dict())
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(big.encode(images).mean, model.encode(images).mean)
    assert torch.equal(big.decode(tokens), model.decode(tokens, size=(64, 64)))


def test_training_after_sampling_at_another_size():
    model = small()
    with torch.inference_mode():
        model.encode(torch.rand(1, 3, 64, 64))
    model.encode(torch.rand(1, 3, 64, 64)).mean.sum().backward()


def test_weights_without_memory_then_assigned():
    "Built on the meta device and filled by assignment, as large checkpoints are."
    real = small(anchored=True).eval()
    with torch.device('meta'):
        model = small(anchored=True).eval()
    model.load_state_dict(real.state_dict(), assign=True)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(model.encode(images).mean, real.encode(images).mean)


def test_half_precision_runs():
    model = small(anchored=True).bfloat16().eval()
    q = model.encode(torch.rand(2, 3, 32, 32).bfloat16())
    assert q.mean.dtype == q.sample(torch.randn_like(q.mean)).dtype == model.decode(q.mean).dtype == torch.bfloat16


@kinds
def test_autocast_trains(changes):
    model = small(**changes)
    with torch.autocast('cpu', torch.bfloat16):
        images = model.decode(model.encode(torch.rand(2, 3, 32, 32)).mean, torch.randn(2, 5, 12))
    images.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_patches_there_and_back():
    images = torch.rand(2, 3, 24, 32)
    patches = _cut_patches(images, 8)
    conv = torch.nn.Conv2d(3, 5, 8, 8)
    assert torch.allclose(conv(images).flatten(2).transpose(1, 2),
                          torch.nn.functional.linear(patches, conv.weight.flatten(1), conv.bias), atol=1e-6)
    colour_last = patches.view(2, 12, 3, 64).transpose(2, 3).flatten(2)
    assert torch.equal(join_patches(colour_last, 3, 4), images)


def test_cells_and_their_middles():
    places = _anchored_coordinates(4, 8, 2)
    rows, columns = places[:32].unbind(1)
    for i, (row, column) in enumerate(places[32:]):
        cell = (rows // 2 == i // 2) & (columns // 4 == i % 2)
        assert (row, column) == (rows[cell].mean(), columns[cell].mean())
        x = torch.randn(1, 32, 3)
        assert torch.allclose(_cell_means(x, 4, 8, 2)[0, i], x[0, cell].mean(0))


def test_start_of_the_weights():
    plain, anchored = small(), small(anchored=True, initial_logvar=-5.)
    assert abs(plain.encoder.blocks[0].mlp.w12.weight.std() - 0.02) < 1e-3
    assert not plain.encoder.to_moments.bias.any() and not plain.decoder.conv_out.bias.any()
    query, key, _ = anchored.encoder.blocks[1].attn.qkv.weight.chunk(3)
    assert torch.allclose(query @ query.T, 1.5**2 * torch.eye(24), atol=1e-4)
    assert abs((key - query).std() - 0.02) < 3e-3
    assert (anchored.encoder.to_moments.bias == torch.tensor([0.] * 6 + [-5.] * 6)).all()
    assert torch.equal(anchored.decoder.latent_positions[2], anchored.decoder.mask_token[0, 0])
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(anchored.decoder.conv_out(images), images)


def test_tokens_of_the_flow():
    model = small()
    tokens = torch.randn(50, 4, 6) * torch.arange(1, 7) + 3
    assert torch.allclose(model.to_flow(tokens), tokens * 1.0143)
    model.measure_tokens(tokens)
    flow = model.to_flow(tokens)
    assert flow.mean((0, 1)).abs().max() < 1e-5 and (flow.std((0, 1)) - 1).abs().max() < 1e-3
    assert torch.allclose(model.from_flow(flow), tokens, atol=1e-5)
    assert {'token_mean', 'token_scale'} <= set(model.state_dict())
    with pytest.raises(ValueError):
        model.measure_tokens(torch.ones(5, 4, 6))


def test_refusals():
    model = small(anchored=True)
    for images, named in ((torch.zeros(2, 3, 32, 32, dtype=torch.uint8), 'uint8'),
                          (torch.rand(3, 32, 32), '3, 32, 32'), (torch.rand(2, 1, 32, 32), '2, 1, 32, 32'),
                          (torch.rand(2, 3, 40, 32), '16.*40|40.*16'), (torch.rand(2, 3, 0, 32), '16')):
        with pytest.raises(ValueError, match=named):
            model.encode(images)
    for tokens, text, size, named in ((torch.rand(2, 6, 4), None, None, '2, 6, 4'),
                                      (torch.rand(2, 4, 6), torch.rand(1, 5, 12), None, '1.*2|2.*1'),
                                      (torch.rand(2, 4, 6), torch.rand(2, 4, 12), None, '2, 4, 12'),
                                      (torch.rand(2, 4, 6), None, (30, 32), '30')):
        with pytest.raises(ValueError, match=named):
            model.decode(tokens, text, size)
    with pytest.raises(ValueError, match='4'):
        small(positions='learned').encode(torch.rand(1, 3, 64, 64))
