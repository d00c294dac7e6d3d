"Released checkpoints: the authors' numbers through the loaders, strictness, safety, the hub, and our own layout."
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowtok.models.released import (FLOWTOK_NAMES, _KNOWN_HEADS, ROPE_KEYS, _TOKEN_BUFFERS, flowtok_config, read_state,
                                 _released_shape, rename, tokenizer_config, tokenizer_names)
from flowtok.config import FlowConfig, FlowTokConfig, SamplingConfig, TextConfig, TokenizerConfig, from_json, preset
from flowtok.flow.solver import sample
from flowtok.models.flowtok import FlowTok
from flowtok.pipeline import FlowTokPipeline, embedded_weights
from flowtok.pretrained import convert, load_flowtok, load_tokenizer, released_pipeline
from flowtok.models.text import text_encoder
from flowtok.models.tokenizer import ImageTokenizer

goldens = Path(__file__).parent / 'goldens'
flow_file = goldens / 'flowtok_nano' / 'FlowTok-nano.safetensors'
token_files = {'flowtitok_nano64': 'FlowTiTok_nano.bin', 'flowtitok_nano128': 'FlowTiTok_nano.safetensors',
               'tatitok_nano64': 'model.safetensors'}
heads = dict(num_heads=4, projector_num_heads=8)


def token_heads(name):
    c = json.loads((goldens / name / 'golden.json').read_text())['config']
    return dict(encoder_heads=c['encoder']['num_heads'], decoder_heads=c['decoder']['num_heads'])


def agree(ours, golden, tolerance=2e-5):
    assert ours.shape == golden.shape
    assert (ours.detach() - golden).abs().max() <= tolerance * max(1, golden.abs().max())


def write(state, file):
    "A checkpoint in the format of its suffix."
    save_file(state, file) if file.suffix == '.safetensors' else torch.save(state, file)
    return file


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def flow_state():
    return load_file(flow_file)


@pytest.fixture
def token_state():
    return read_state(goldens / 'flowtitok_nano128' / 'FlowTiTok_nano.safetensors')


# the authors' numbers

@pytest.mark.parametrize('suffix', ['.pth', '.bin', '.safetensors'])
def test_flowtok_from_every_format(flow_state, tmp_path, suffix):
    golden = load_file(goldens / 'flowtok_nano' / 'golden.safetensors')
    model = load_flowtok(write(flow_state, tmp_path / f'x{suffix}'), **heads)
    assert isinstance(model, FlowTok) and not model.training
    for i in (0, 1):
        agree(model.velocity(golden['x'], golden['t'], i), golden[f'velocity_indicator{i}'])
    posterior = model.source(golden['text'])
    agree(posterior.mean, golden['text_mu'])
    agree(posterior.logvar, golden['text_logvar'])
    agree(model.alignment_target(golden['text']), golden['context_projector'])
    agree(sample(model.velocity, golden['text_mu'][:2], num_inference_steps=20, schedule='released'),
          golden['euler20_end'])


@pytest.mark.parametrize('suffix', ['.pth', '.bin', '.safetensors'])
@pytest.mark.parametrize('name', token_files)
def test_tokenizers_from_every_format(tmp_path, name, suffix):
    golden = load_file(goldens / name / 'golden.safetensors')
    file = write(read_state(goldens / name / token_files[name]), tmp_path / f'x{suffix}')
    model = load_tokenizer(file, **token_heads(name))
    images = golden['image_u8'].float() / 255
    assert isinstance(model, ImageTokenizer) and not model.training
    assert model.config.image_size == images.shape[2]
    assert model.config.positions == ('learned' if name.startswith('tatitok') else 'rope')
    q, latents = model.encode(images), golden['latents'].squeeze(2).mT
    agree(q.mean, golden['mean'].squeeze(2).mT)
    agree(q.logvar, golden['logvar'].squeeze(2).mT)
    agree(model.to_flow(q.mean), golden['flow_tokens_from_mean'])
    agree(model.decode(latents, golden['text']), golden['decoded'].clamp(0, 1))
    agree(model.train().decode(latents, golden['text']), golden['decoded'])
    if model.config.positions == 'rope':
        agree(model.encoder.grid.tables.cos, golden['encoder_rope_cos'], 5e-6)
        agree(model.decoder.grid.tables.sin, golden['decoder_rope_sin'], 5e-6)


@torch.no_grad()
def test_pipeline_from_features_to_pixels():
    golden = load_file(goldens / 'pipeline' / 'golden.safetensors')
    described = json.loads((goldens / 'pipeline' / 'golden.json').read_text())
    model = load_flowtok(flow_file, **heads)
    tokenizer = load_tokenizer(goldens / 'flowtitok_nano64' / 'FlowTiTok_nano.bin', **token_heads('flowtitok_nano64'))
    start = model.source(golden['text']).mean
    agree(start, golden['start'])
    end = sample(model.velocity, start, num_inference_steps=described['steps'], schedule='released',
                 guidance_scale=described['guidance_scale'])
    agree(end, golden['end'])
    assert tokenizer.config.latent_scale == described['scale_factor']
    images = tokenizer.train().decode(tokenizer.from_flow(end), golden['text'])
    agree(images, golden['image'])
    levels = (255 * images + 0.5).clamp(0, 255).floor()
    assert (levels - golden['image_uint8'].float()).abs().max() <= 1


def test_loaded_weights_can_be_trained(flow_state):
    model = load_flowtok(flow_file, **heads)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ['dit.positions']
    assert model.temperature == flow_state['t2t_temperature']


# names and sizes

def test_names_are_one_to_one():
    for names in (FLOWTOK_NAMES, tokenizer_names('rope'), tokenizer_names('learned')):
        assert len(set(names.values())) == len(names)
    for key in flow_file, *(goldens / name / file for name, file in token_files.items()):
        names = FLOWTOK_NAMES if key == flow_file else tokenizer_names('learned' if 'tatitok' in str(key) else 'rope')
        back = {ours: theirs for theirs, ours in names.items()}
        assert all(rename(rename(k, names), back) == k for k in read_state(key))


def as_released(model, names):
    "The tensors of a network, named and shaped as a released file of that size has them."
    back = {ours: theirs for theirs, ours in names.items()}
    state = {(k := rename(ours, back)): x.reshape(_released_shape(k, x.shape)) for ours, x in model.state_dict().items()
             if ours not in _TOKEN_BUFFERS}
    if names == tokenizer_names('rope'):
        for key in ROPE_KEYS:
            side, part = key.split('.')[0], key.split('_')[-1]
            state[key] = getattr(getattr(model, side).grid.tables, part)
    return state


def without_memory(kind, config):
    with torch.device('meta'):
        return kind(config)


learned = replace(preset('b'), tokenizer=TokenizerConfig(num_tokens=32, positions='learned'))
for_512 = replace(preset('b'), tokenizer=TokenizerConfig(image_size=512))
released_sampling = SamplingConfig(schedule='released')


@pytest.mark.parametrize('file, kind, config, names', [
    ('FlowTok-XL', FlowTok, preset('xl'), FLOWTOK_NAMES), ('FlowTok-H', FlowTok, preset('h'), FLOWTOK_NAMES),
    ('FlowTiTok-256', ImageTokenizer, preset('b'), tokenizer_names('rope')),
    ('FlowTiTok-512', ImageTokenizer, for_512, tokenizer_names('rope')),
    ('TA-TiTok-bl32-vae', ImageTokenizer, learned, tokenizer_names('learned'))])
def test_names_and_shapes_of_the_released_files(file, kind, config, names):
    entries = json.loads((goldens / 'keys' / f'{file}.json').read_text())
    ours = as_released(without_memory(kind, config), names)
    assert {key: tuple(x.shape) for key, x in ours.items()} == {key: tuple(shape) for key, shape in entries.items()}


@pytest.mark.parametrize('name', ['s', 'b', 'l', 'xl', 'h'])
def test_sizes_of_the_papers_models_are_read_off(name):
    config = flowtok_config(as_released(without_memory(FlowTok, preset(name)), FLOWTOK_NAMES), f'{name}.pth')
    assert config == replace(preset(name), sampling=released_sampling)


def test_sizes_of_the_papers_tokenizers_are_read_off():
    for config in (preset('b'), for_512):
        found = tokenizer_config(as_released(without_memory(ImageTokenizer, config), tokenizer_names('rope')), 'x.bin')
        assert (found.tokenizer, found.text) == (config.tokenizer, config.text)
    c = TokenizerConfig(num_tokens=128, encoder_width=512, encoder_depth=8, encoder_heads=8, positions='learned')
    model = without_memory(ImageTokenizer, replace(preset('b'), tokenizer=c))
    state = as_released(model, tokenizer_names('learned'))
    assert tokenizer_config(state, 'model.safetensors').tokenizer == c
    with pytest.raises(ValueError, match='256.*image_size.*512'):
        tokenizer_config(state, 'model.safetensors', 512)


@pytest.mark.parametrize('tokens, dim, width, depth, text', [
    (1, 1, 12, 1, 8), (32, 8, 24, 3, 20), (128, 32, 36, 13, 4)])
def test_a_flowtok_of_any_size_is_read_off(tmp_path, tokens, dim, width, depth, text):
    sizes = TextConfig(length=tokens, width=text, projector_depth=depth, projector_heads=2, projector_hidden=7,
                       align_hidden=5)
    config = FlowTokConfig('any', TokenizerConfig(num_tokens=tokens, token_dim=dim), sizes, FlowConfig(depth, width, 3),
                           released_sampling)
    model = FlowTok(config)
    file = write(as_released(model, FLOWTOK_NAMES), tmp_path / 'any.pth')
    again = load_flowtok(file, num_heads=3, projector_num_heads=2)
    assert again.config == config and same_weights(again, model)


@pytest.mark.parametrize('positions', ['rope', 'learned'])
@pytest.mark.parametrize('size, patch, tokens, dim, encoder, decoder', [
    (16, 16, 77, 16, (24, 1, 2), (16, 3, 1)), (40, 8, 3, 5, (20, 12, 5), (48, 1, 4)),
    (512, 16, 9, 2, (8, 1, 1), (8, 1, 2))])
def test_a_tokenizer_of_any_size_is_read_off(tmp_path, positions, size, patch, tokens, dim, encoder, decoder):
    c = TokenizerConfig(size, patch, tokens, dim, *encoder, *decoder, positions)
    model = ImageTokenizer(FlowTokConfig('any', c, TextConfig(length=6, width=9, projector_heads=1))).eval()
    file = write(as_released(model, tokenizer_names(positions)), tmp_path / 'any.bin')
    again = load_tokenizer(file, encoder_heads=encoder[2], decoder_heads=decoder[2])
    assert again.config == c and again.text_shape == (6, 9) and same_weights(again, model)
    images = torch.rand(1, 3, size, size)
    assert torch.equal(again.encode(images).mean, model.encode(images).mean)


def test_heads_that_no_preset_knows():
    with pytest.raises(ValueError, match='32.*768.*8.*projector_num'):
        load_flowtok(flow_file, num_heads=4)
    with pytest.raises(ValueError, match='64.*1152.*16.*1280.*20.*num_heads'):
        load_flowtok(flow_file, projector_num_heads=8)
    for name in token_files:
        with pytest.raises(ValueError, match='encoder_heads'):
            load_tokenizer(goldens / name / token_files[name], decoder_heads=4)
        with pytest.raises(ValueError, match='decoder_heads'):
            load_tokenizer(goldens / name / token_files[name], encoder_heads=4)
    assert _KNOWN_HEADS['num_heads'] == {384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 20}


@torch.no_grad()
def test_other_resolutions_with_the_same_file(tmp_path):
    file, given = goldens / 'flowtitok_nano64' / 'FlowTiTok_nano.bin', token_heads('flowtitok_nano64')
    small, large = load_tokenizer(file, **given), load_tokenizer(file, image_size=512, **given)
    images = torch.rand(1, 3, 512, 512)
    tokens = large.encode(images).mean
    assert same_weights(small, large) and torch.equal(small.encode(images).mean, tokens)
    file = write(as_released(large, tokenizer_names('rope')), tmp_path / 'FlowTiTok_512.bin')
    again = load_tokenizer(file, **given)
    assert read_state(file)['decoder.positional_embedding.freqs_sin'].shape == (32**2, 20)
    assert again.config.image_size == 512 and torch.equal(again.decode(tokens), small.decode(tokens, size=(512, 512)))
    assert load_tokenizer(file, image_size=64, **given).config == small.config
    for wrong in (0, 100):
        with pytest.raises(ValueError, match=f'{wrong}'):
            load_tokenizer(file, image_size=wrong, **given)


# strict in both directions

@pytest.mark.parametrize('key', ['blocks.1.mlp.fc2.bias', 'pos_embed', 't2t_temperature', 'x_embedder.weight',
                                 'context_projector.4.bias', 'context_encoder.layers.1.norm2.g'])
def test_missing_tensors_of_a_flowtok(flow_state, tmp_path, key):
    del flow_state[key]
    with pytest.raises(ValueError, match=f'{re.escape(key)}'):
        load_flowtok(write(flow_state, tmp_path / 'x.pth'), **heads)


@pytest.mark.parametrize('key', ['latent_tokens', 'decoder.ffn.0.weight', 'encoder.transformer.0.mlp.w12.bias',
                                 'encoder.positional_embedding.freqs_cos', 'decoder.positional_embedding.freqs_sin'])
def test_missing_tensors_of_a_tokenizer(token_state, tmp_path, key):
    del token_state[key]
    with pytest.raises(ValueError, match=f'{re.escape(key)}'):
        load_tokenizer(write(token_state, tmp_path / 'x.bin'), **token_heads('flowtitok_nano128'))


def test_all_faults_are_named_at_once(flow_state, tmp_path):
    del flow_state['final_layer.linear.bias']
    flow_state |= {'module.extra': torch.zeros(1), 'blocks.9.attn.qkv.bias': torch.zeros(3),
                   'blocks.0.attn.proj.weight': torch.zeros(64, 63), 'pos_embed': flow_state['pos_embed'][:, :, :-1]}
    with pytest.raises(ValueError) as error:
        load_flowtok(write(flow_state, tmp_path / 'x.pth'), **heads)
    for key in ('final_layer.linear.bias', 'blocks.9.attn.qkv.bias', 'module.extra', 'blocks.0.attn.proj.weight',
                '(64, 63)', '(64, 64)', 'pos_embed', '(1, 77, 63)', '(1, 77, 64)'):
        assert key in str(error.value)


def test_unexpected_and_misshapen_tensors_of_a_tokenizer(token_state, tmp_path):
    token_state |= {'quantize.codebook': torch.zeros(2), 'encoder.conv_out.weight': torch.zeros(32, 32)}
    named = r'quantize\.codebook.*encoder\.conv_out\.weight.*\(32, 32\).*\(32, 32, 1, 1\)'
    with pytest.raises(ValueError, match=named):
        load_tokenizer(write(token_state, tmp_path / 'x.bin'), **token_heads('flowtitok_nano128'))


def test_rotary_tables_must_follow_from_the_sizes(token_state, tmp_path):
    file, given = tmp_path / 'x.safetensors', token_heads('flowtitok_nano128')
    token_state['decoder.positional_embedding.freqs_sin'] *= 0.9
    with pytest.raises(ValueError, match='freqs_sin'):
        load_tokenizer(write(token_state, file), **given)
    with pytest.raises(ValueError, match=r'decoder\.positional_embedding\.freqs_cos'):
        load_tokenizer(file, **given | {'decoder_heads': 1})


def test_values_that_are_no_numbers(flow_state, tmp_path):
    flow_state['x_embedder.bias'][3] = float('nan')
    flow_state['final_layer.linear.bias'] = flow_state['final_layer.linear.bias'].long()
    with pytest.raises(ValueError, match=r'final_layer.*linear\.bias.*x_embedder'):
        load_flowtok(write(flow_state, tmp_path / 'x.pth'), **heads)


def test_checkpoints_of_something_else(flow_state, token_state, tmp_path):
    with pytest.raises(ValueError, match='load_flowtok'):
        load_tokenizer(flow_file)
    with pytest.raises(ValueError, match='load_tokenizer'):
        load_flowtok(write(token_state, tmp_path / 'x.bin'))
    with pytest.raises(ValueError):
        load_flowtok(write({'visual.proj': torch.zeros(1)}, tmp_path / 'y.bin'))
    for wrapped in ({'state_dict': flow_state}, [1, 2], {}, {1: torch.zeros(1)}):
        torch.save(wrapped, tmp_path / 'z.pth')
        with pytest.raises(ValueError):
            load_flowtok(tmp_path / 'z.pth')
    with pytest.raises(ValueError):
        read_state(__file__)


def test_half_precision_files_become_float32(flow_state, tmp_path):
    model = load_flowtok(write({k: x.half() for k, x in flow_state.items()}, tmp_path / 'x.pth'), **heads)
    assert {x.dtype for x in model.state_dict().values()} == {torch.float32}


# safety

class Harmful:
    def __init__(self, file): self.file = file
    def __reduce__(self): return Path.touch, (self.file,)


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('load', [load_flowtok, load_tokenizer, read_state])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, load, legacy):
    torch.save({'x_embedder.weight': Harmful(tmp_path / 'ran')}, tmp_path / 'x.pth',
               _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError):
        load(tmp_path / 'x.pth')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('suffix', ['.pth', '.bin', '.safetensors'])
def test_files_that_are_cut_off_or_garbage(flow_state, tmp_path, suffix):
    file = write(flow_state, tmp_path / f'x{suffix}')
    whole = file.read_bytes()
    for part in (whole[:len(whole) // 2], whole[:100], b'', b'not a checkpoint at all'):
        file.write_bytes(part)
        with pytest.raises(ValueError):
            load_flowtok(file, **heads)


# the hub

@pytest.fixture
def hub(monkeypatch):
    "A hub that has the files put into it, and no network."
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError
    files = {}

    def download(repo, file, local_files_only=False):
        if (repo, file) not in files:
            raise LocalEntryNotFoundError('offline')
        return str(files[repo, file])
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    return files


def test_without_the_hub_one_sentence_says_what_to_do(hub):
    with pytest.raises(FileNotFoundError) as error:
        load_flowtok('turkeyju/FlowTok')
    for words in ('FlowTok-XL.pth (2.8 GB', 'FlowTok-H.pth (4.4 GB', 'FlowTiTok_512.bin (1.6 GB', 'give its path'):
        assert words in str(error.value)
    with pytest.raises(FileNotFoundError, match=r'H\.pth'):
        load_flowtok('turkeyju/FlowTok/FlowTok-H.pth')
    with pytest.raises(FileNotFoundError, match='FlowTiTok_512'):
        load_tokenizer('turkeyju/FlowTok')
    with pytest.raises(FileNotFoundError, match=r'model\.safetensors'):
        load_tokenizer('turkeyju/tokenizer_tatitok_bl32_vae')


def test_a_hub_that_is_switched_off(tmp_path):
    code = "from flowtok.pretrained import load_flowtok; load_flowtok('turkeyju/FlowTok')"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          env=os.environ | {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)})
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('FileNotFoundError: There is no file turkeyju/FlowTok here')
    assert 'FlowTok-H.pth (4.4 GB' in last


def test_from_the_hub(hub, tmp_path):
    hub['turkeyju/FlowTok', 'FlowTok-XL.pth'] = hub['a/b', 'deep/x.safetensors'] = flow_file
    for name in ('turkeyju/FlowTok', 'a/b/deep/x.safetensors'):
        assert load_flowtok(name, **heads).config.flow.depth == 2
    hub['a/tatitok', 'model.safetensors'] = goldens / 'tatitok_nano64' / 'model.safetensors'
    assert load_tokenizer('a/tatitok', **token_heads('tatitok_nano64')).config.positions == 'learned'
    folder = convert(flow_file, tmp_path, **heads)
    hub |= {('me/ours', name): folder / name for name in ('model.safetensors', 'config.json')}
    assert load_flowtok('me/ours').config.flow.heads == 4


@pytest.fixture
def released(tmp_path, monkeypatch):
    "A folder with the three files of a released pipeline, all of them small."
    import open_clip
    text = flowtok_config(read_state(flow_file), 'nano.pth', **heads).text
    sizes = dict(context_length=text.length, vocab_size=text.vocab_size, width=text.width, heads=4, layers=1)
    monkeypatch.setattr(open_clip, 'get_model_config', lambda name: {'text_cfg': sizes})
    write(read_state(flow_file), tmp_path / 'FlowTok-XL.pth')
    shutil.copy(goldens / 'flowtitok_nano64' / 'FlowTiTok_nano.bin', tmp_path / 'FlowTiTok_512.bin')
    save_file(text_encoder(text).tower.state_dict(), tmp_path / 'open_clip_model.safetensors')
    return tmp_path


@torch.no_grad()
def test_three_released_files_make_a_pipeline(released):
    pipe = released_pipeline(released, 'xl', **heads, **token_heads('flowtitok_nano64'))
    assert pipe.parts.keys() == {'tokenizer', 'text-to-image'} and pipe.config.sampling.schedule == 'released'
    tokens = pipe('a photo of a cat', output_type='tokens', temperature=0.)
    features = pipe.text_encoder(pipe.text_encoder.tokenize('a photo of a cat'))
    flow = load_flowtok(flow_file, **heads)
    end = sample(flow.velocity, flow.source(features).mean, schedule='released')
    assert torch.allclose(tokens, end, atol=1e-5) and not torch.allclose(sample(flow.velocity, flow.source(features).mean), end)
    image = load_tokenizer(released / 'FlowTiTok_512.bin', **token_heads('flowtitok_nano64')).decode(end / 1.0143, features)
    assert torch.allclose(pipe('a photo of a cat', output_type='pt', temperature=0.), image, atol=1e-5)
    with pytest.raises(RuntimeError):
        pipe.caption(image)
    pipe.save_pretrained(released / 'ours', dtype=None)
    again = FlowTokPipeline.from_pretrained(released / 'ours', released / 'open_clip_model.safetensors')
    assert torch.allclose(again('a photo of a cat', output_type='tokens', temperature=0.), end, atol=1e-5)


def test_the_variant_reaches_the_released_files(released):
    with pytest.raises(ValueError, match='projector_num_heads'):  # read as far as widths that are nobody's
        FlowTokPipeline.from_pretrained(released, variant='xl')
    with pytest.raises(ValueError):
        FlowTokPipeline.from_pretrained(released, variant='xxl')


@pytest.mark.parametrize('missing', ['FlowTok-XL.pth', 'FlowTiTok_512.bin', 'open_clip_model.safetensors', 'all'])
def test_a_pipeline_without_its_files_names_the_three(released, hub, missing, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(released / 'cache'))
    monkeypatch.setattr('flowtok.models.text.reachable', lambda: False)
    if missing != 'all':
        (released / missing).unlink()
    with pytest.raises(FileNotFoundError) as error:
        FlowTokPipeline.from_pretrained('turkeyju/FlowTok' if missing == 'all' else released, variant='xl')
    for words in ('three files, FlowTok-XL.pth (2.8 GB', 'FlowTiTok_512.bin (1.6 GB', 'put them into one folder',
                  'open_clip_model.safetensors (1.7 GB)', '' if missing == 'all' else f', which lacks {missing}.'):
        assert words in str(error.value)


def test_a_pipeline_with_a_clip_that_is_not_there(released):
    with pytest.raises(FileNotFoundError, match=r'nothing\.pt'):
        FlowTokPipeline.from_pretrained(released, 'nothing.pt', 'xl')


@pytest.mark.parametrize('name', ['nothing.pth', 'weights/nothing.pth', './a/b', '/a/b/c', 'word'])
def test_files_that_are_not_there(hub, name):
    with pytest.raises(FileNotFoundError):
        load_flowtok(name)


def test_a_mistyped_file_of_a_folder_is_not_asked_of_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('a/b').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r'x\.pth'):
        load_flowtok('a/b/x.pth')


# our own layout

def test_convert_a_flowtok(tmp_path):
    folder = convert(flow_file, tmp_path / 'a' / 'b', activation='gelu', **heads)
    assert sorted(p.name for p in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    config = from_json((folder / 'config.json').read_text())
    assert config.flow.heads == 4 and config.text.projector_heads == 8 and config.text.activation == 'gelu'
    assert config.tokenizer.latent_scale == 1.0143 and config.sampling.schedule == 'released'
    for path in (folder, folder / 'model.safetensors', str(folder)):
        again = load_flowtok(path)
        assert same_weights(again, load_flowtok(flow_file, **heads)) and again.config == config
    assert 'load_flowtok' in (folder / 'README.md').read_text()
    convert(folder, tmp_path / 'c')
    assert from_json((tmp_path / 'c' / 'config.json').read_text()) == config


@pytest.mark.parametrize('name', token_files)
def test_convert_a_tokenizer(tmp_path, name):
    file, given = goldens / name / token_files[name], token_heads(name)
    first, again = load_tokenizer(file, **given), load_tokenizer(convert(file, tmp_path, **given))
    assert same_weights(first, again) and again.config == first.config and again.text_shape == first.text_shape
    images = torch.rand(1, 3, first.config.image_size, first.config.image_size)
    assert torch.equal(first.encode(images).mean, again.encode(images).mean)


def test_own_weights_need_their_config(tmp_path):
    (convert(flow_file, tmp_path, **heads) / 'config.json').unlink()
    with pytest.raises(FileNotFoundError, match=r'config\.json'):
        load_flowtok(tmp_path)


def test_own_weights_are_read_strictly(tmp_path):
    file = convert(flow_file, tmp_path, **heads) / 'model.safetensors'
    state = load_file(file)
    state['dit.extra'] = state.pop('dit.embed.bias')
    save_file(state, file)
    with pytest.raises(ValueError, match=r'dit\.embed\.bias.*dit\.extra'):
        load_flowtok(tmp_path)


def test_weights_of_the_package_load_too():
    model = load_flowtok(embedded_weights() / 'text-to-image.safetensors')
    assert model.config == from_json((embedded_weights() / 'config.json').read_text())
    tokenizer = load_tokenizer(embedded_weights() / 'tokenizer.safetensors')
    assert tokenizer.config.anchored and not (tokenizer.token_scale == 1).all()


def test_a_conversion_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    folder = convert(flow_file, tmp_path, **heads)
    before = (folder / 'model.safetensors').read_bytes()

    def full(*args): raise OSError('No space left on device')
    monkeypatch.setattr('safetensors.torch.save_file', full)
    with pytest.raises(OSError):
        convert(flow_file, tmp_path, **heads)
    assert (folder / 'model.safetensors').read_bytes() == before and same_weights(
        load_flowtok(folder), load_flowtok(flow_file, **heads))


def test_command_line(tmp_path):
    def run(*args): return subprocess.run([sys.executable, '-m', 'flowtok.cli', 'convert', *map(str, args)],
                                          capture_output=True, text=True)
    assert 'SOURCE' in run('--help').stdout.upper()
    done = run(flow_file, tmp_path / 'out', '--num-heads', 4, '--projector-num-heads', 8)
    assert done.returncode == 0 and (tmp_path / 'out' / 'model.safetensors').is_file(), done.stderr
    failed = run(flow_file, tmp_path / 'out')
    assert failed.returncode == 1 and 'Traceback' not in failed.stderr
