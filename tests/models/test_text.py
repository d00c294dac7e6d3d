"Captions, their features and tokens: definitions written out a second time, checkpoints, and what is refused."
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from flowtok.config import FlowTokConfig, TextConfig, TokenizerConfig, preset
from flowtok.models.text import (AlignmentMLP, ClipTextEncoder, ProjectorLayer, TextDecoder, TextProjector,
                          WordTextEncoder, _open_clip_names, _load_clip, _pad_ids, _tell_truncation, text_encoder,
                          )

tiny = preset('tiny')


@pytest.fixture
def words():
    return WordTextEncoder(tiny.text)


@pytest.fixture
def small(monkeypatch):
    "CLIP's text side with a small tower in place of the large one."
    import open_clip
    sizes = {'context_length': 77, 'vocab_size': 49408, 'width': 32, 'heads': 2, 'layers': 3}
    monkeypatch.setattr(open_clip, 'get_model_config', lambda name: {'text_cfg': sizes})
    return TextConfig(width=32)


# captions and ids

def test_rows_are_padded_and_cut():
    _tell_truncation.cache_clear()
    with pytest.warns(UserWarning, match='3'):
        assert _pad_ids([[4, 1], [4, 5, 6, 7, 1], [4, 5, 1]], 3).tolist() == [[4, 1, 0], [4, 5, 1], [4, 5, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        _pad_ids([[4, 5, 6, 7, 1]], 3)


def test_words_there_and_back(words):
    every = list(tiny.text.vocabulary)
    ids = words.tokenize(every)
    assert ids.dtype == torch.long and ids.max() == tiny.text.vocab_size - 1
    assert words.decode_ids(ids) == every
    assert words.decode_ids(torch.tensor([[5, 0, 6, 1, 7]])) == [f'{words.words[5]} {words.words[6]}']
    assert words.decode_ids(torch.tensor([[5, 6]])) == [f'{words.words[5]} {words.words[6]}']


def test_case_and_punctuation_do_not_matter(words):
    plain = words.tokenize('a large red circle left of a small star')
    assert torch.equal(words.tokenize(['  A LARGE, red circle;\nleft-of "a" small star!']), plain)


@pytest.mark.parametrize('captions, named', [
    ([], 'caption'),
    ([7], '7'),
    (['a circle', None], 'None'),
    (['a trianlge'], 'trianlge.*triangle'),
    (['a xylophone'], 'xylophone'), ([''], "''"), (['!!!'], '!!!'), (['\U0001F600'], '\U0001F600'),
    (['a circle', 'ein Kreis'], "'ein'"),
    (['<end>', '<pad>'], "'end'"),
])
def test_bad_captions(words, captions, named):
    with pytest.raises(ValueError, match=named):
        words.tokenize(captions)


@pytest.mark.parametrize('prompt', ['a trianlge', 'a xylophone', '!!!', ''])
def test_an_error_about_words_is_one_line_and_names_each_word_once(words, prompt):
    with pytest.raises(ValueError) as error:
        words.tokenize([prompt])
    said = str(error.value)
    assert '\n' not in said and max(said.split().count(f'{word},') for word in tiny.text.vocabulary) <= 1
    assert 'triangle' in said


@pytest.mark.parametrize('typed, meant', [('a big gray ring in the center', 'a large grey ring middle centre'),
                                          ('Image of the little blue star.', 'a small blue star')])
def test_synonyms_have_the_ids_of_the_words(words, typed, meant):
    assert torch.equal(words.tokenize([typed]), words.tokenize([meant]))


def test_synonyms_belong_to_the_scenes_alone():
    other = WordTextEncoder(replace(tiny.text, vocabulary=('big', 'the', 'dog'), vocab_size=5, rewrites=()))
    assert other.tokenize(['the big dog'])[0, :4].tolist() == [3, 2, 4, 1]


def test_word_features_are_frozen_and_need_no_file(words):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = WordTextEncoder(tiny.text)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in words.state_dict().items())
    assert not any(p.requires_grad for p in words.parameters())
    with torch.device('meta'):
        assert next(WordTextEncoder(tiny.text).parameters()).device.type == 'cpu'


def test_word_features_have_not_changed(words):
    "Trained weights rely on these numbers."
    features = words(words.tokenize(['a small red circle']))
    assert features.shape == (1, 16, 128)
    expected = torch.tensor([[-0.5935, -0.8436, -1.1143, 0.8838], [2.6361, -1.1162, 1.0946, 0.0178]])
    assert torch.allclose(features[0, :2, :4], expected, atol=1e-4), features[0, :2, :4]


# CLIP

def test_clip_ids(small):
    clip = text_encoder(small)
    _tell_truncation.cache_clear()
    with pytest.warns(UserWarning, match='77'):
        ids = clip.tokenize(['a photo of a cat', 'a ' * 100])
    assert ids.shape == (2, 77) and ids.dtype == torch.long
    assert ids[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407] + 70 * [0]
    assert ids[1].tolist() == [49406] + 75 * [320] + [49407]
    assert torch.equal(ids, clip.bpe(['a photo of a cat', 'a ' * 100]))  # open_clip's own
    assert clip.decode_ids(ids) == ['a photo of a cat', ' '.join(75 * 'a')]
    assert clip.decode_ids(torch.tensor([[320, 2368], [49407, 320]])) == ['a cat', '']
    for captions in ([], ['a cat', 3]):
        with pytest.raises(ValueError):
            clip.tokenize(captions)


def written_out(tower, ids, gelu):
    "The features of a CLIP text tower, from its weights."
    heads = tower.config.num_attention_heads
    x = tower.embeddings.token_embedding.weight[ids] + tower.embeddings.position_embedding.weight
    b, n, c = x.shape
    later = torch.ones(n, n).triu(1).bool()
    for layer in tower.encoder.layers:
        attn, h = layer.self_attn, layer.layer_norm1(x)
        q, k, v = (part(h).view(b, n, heads, -1).transpose(1, 2) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
        scores = (q @ k.transpose(-1, -2) / q.shape[-1]**0.5).masked_fill(later, -torch.inf)
        x = x + attn.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))
        x = x + layer.mlp.fc2(gelu(layer.mlp.fc1(layer.layer_norm2(x))))
    return tower.final_layer_norm(x)


def to_open_clip(state):
    "Tensors of the text tower by the names of open_clip: the map of the chapter, read backwards."
    found = {}
    for name, x in state.items():
        if '.k_proj.' in name or '.v_proj.' in name:
            continue
        if '.q_proj.' in name:
            x = torch.cat([state[name.replace('.q_proj.', f'.{part}_proj.')] for part in 'qkv'])
        for theirs, ours in _open_clip_names.items():
            name = name.replace(ours, theirs)
        found[name.replace('.self_attn.q_proj.', '.attn.in_proj_')] = x
    return found


@pytest.mark.parametrize('activation, gelu', [('quick_gelu', lambda x: x * torch.sigmoid(1.702 * x)), ('gelu', F.gelu)])
def test_clip_features_written_out(small, activation, gelu):
    clip = ClipTextEncoder(replace(small, activation=activation))
    for p in clip.tower.parameters():
        nn.init.normal_(p, std=0.3)  # larger than the usual start, so that the two activations differ
    ids = clip.tokenize(['a photo of a cat', 'two cats'])
    features = clip(ids)
    assert features.shape == (2, 77, 32) and not features.requires_grad
    expected = written_out(clip.tower, ids, gelu)
    assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize('prefix', ['', 'text.'])
def test_clip_weights_from_a_file(small, tmp_path, prefix):
    source = ClipTextEncoder(small)
    state = {f'{prefix}{name}': x for name, x in to_open_clip(source.tower.state_dict()).items()}
    state |= {'visual.conv1.weight': torch.zeros(2), 'logit_scale': torch.zeros(()),
              f'{prefix}text_projection': torch.zeros(32, 32)}
    save_file(state, tmp_path / 'clip.safetensors')
    torch.save(state, tmp_path / 'clip.pt')
    ids = source.tokenize(['a photo of a cat'])
    for name in ('clip.safetensors', 'clip.pt'):
        assert torch.equal(ClipTextEncoder(small, tmp_path / name)(ids), source(ids))
        assert torch.equal(ClipTextEncoder(small, str(tmp_path / name))(ids), source(ids))


@pytest.mark.parametrize('whole', [False, True])
def test_transformers_gives_the_same_features(small, tmp_path, whole):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel
    sizes = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=3, intermediate_size=128, vocab_size=49408,
                 max_position_embeddings=77, hidden_act='quick_gelu')
    images = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64, image_size=28, patch_size=14)
    theirs = CLIPModel(CLIPConfig(text_config=sizes, vision_config=images)) if whole else CLIPTextModel(CLIPTextConfig(**sizes))
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    theirs.eval().save_pretrained(tmp_path)
    clip = ClipTextEncoder(small, tmp_path)
    ids = clip.tokenize(['a photo of a cat', 'two cats'])
    with torch.no_grad():
        wanted = (theirs.text_model if whole else theirs)(ids).last_hidden_state
    assert (clip(ids) - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())
    assert torch.equal(ClipTextEncoder(small, tmp_path / 'model.safetensors')(ids), clip(ids))


@torch.no_grad()
def test_the_features_of_open_clip(small, tmp_path, monkeypatch):
    "open_clip's own tower with the same weights gives the same features."
    import open_clip
    clip = ClipTextEncoder(small)
    for p in clip.tower.parameters():
        nn.init.normal_(p, std=0.2)
    sizes = open_clip.get_model_config('ViT-L-14-336')['text_cfg']
    theirs = open_clip.transformer.TextTransformer(**sizes, output_dim=None, output_tokens=True, act_layer=open_clip.transformer.QuickGELU)
    theirs.load_state_dict(to_open_clip(clip.tower.state_dict()), strict=True)
    save_file(theirs.state_dict(), tmp_path / 'theirs.safetensors')
    ids = clip.tokenize(['a photo of a cat', 'two cats'])
    features, wanted = clip(ids), theirs.eval()(ids)[1]
    assert (features - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())
    assert torch.equal(ClipTextEncoder(small, tmp_path / 'theirs.safetensors')(ids), features)


def test_random_clip_features_are_those_of_every_process(small):
    torch.manual_seed(3)
    before, first = torch.get_rng_state(), ClipTextEncoder(small)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    ids = first.tokenize(['a photo of a cat'])
    assert torch.equal(ClipTextEncoder(small)(ids), first(ids))


@torch.no_grad()
def test_the_real_tower_written_out_and_by_transformers(tmp_path):
    "ViT-L-14-336 at its full size, random weights."
    from transformers import CLIPTextConfig, CLIPTextModel
    theirs = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, hidden_act='quick_gelu')).eval()
    theirs.save_pretrained(tmp_path)
    clip = ClipTextEncoder(TextConfig(), tmp_path)
    ids = clip.tokenize(['a photo of a cat'])
    features = clip(ids)
    assert features.shape == (1, 77, 768) and sum(p.numel() for p in clip.tower.parameters()) == 123_060_480
    for wanted in (written_out(clip.tower, ids, lambda x: x * torch.sigmoid(1.702 * x)), theirs(ids).last_hidden_state):
        assert (features - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())


class Harmful:
    def __init__(self, file): self.file = file
    def __reduce__(self): return Path.touch, (self.file,)


def test_clip_weights_that_are_none(small, tmp_path, monkeypatch):
    import open_clip
    save_file({'embed.weight': torch.zeros(2)}, tmp_path / 'other.safetensors')
    with pytest.raises(ValueError, match=r'other\.safetensors.*14.*336'):
        ClipTextEncoder(small, tmp_path / 'other.safetensors')
    whole = ClipTextEncoder(small).tower.state_dict()
    torch.save(whole, tmp_path / 'cut.pt')
    (tmp_path / 'cut.pt').write_bytes((tmp_path / 'cut.pt').read_bytes()[:1000])
    (tmp_path / 'cut.safetensors').write_bytes(b'{"a":')
    torch.save({'a': Harmful(tmp_path / 'ran')}, tmp_path / 'harmful.pt')
    torch.save([1], tmp_path / 'list.pt')
    for name in ('cut.pt', 'cut.safetensors', 'harmful.pt', 'list.pt'):
        with pytest.raises(ValueError, match=f'{name}'):
            ClipTextEncoder(small, tmp_path / name)
    assert not (tmp_path / 'ran').exists()
    whole['final_layer_norm.bias'][0] = torch.nan
    torch.save(whole, tmp_path / 'nan.pt')
    with pytest.raises(ValueError, match=r'nan\.pt.*final_layer_norm'):
        ClipTextEncoder(small, tmp_path / 'nan.pt')
    with pytest.raises(FileNotFoundError):
        ClipTextEncoder(small, 'laion')

    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'empty'))
    monkeypatch.setattr('flowtok.models.text.reachable', lambda: False)
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match='14.*336.*1.*7'):
        ClipTextEncoder(small, 'openai')
    assert time.monotonic() - began < 5                     # no retries


def test_openai_weights_are_where_open_clip_keeps_them(small, tmp_path, monkeypatch):
    "In the hub's cache, which is read without a network."
    source, repository = ClipTextEncoder(small), tmp_path / 'models--timm--vit_large_patch14_clip_336.openai'
    snapshot = repository / 'snapshots' / 'a1'
    snapshot.mkdir(parents=True), (repository / 'refs').mkdir()
    (repository / 'refs' / 'main').write_text('a1')
    save_file(source.tower.state_dict(), snapshot / 'open_clip_model.safetensors')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr('flowtok.models.text.reachable', lambda: False)
    loaded = ClipTextEncoder(replace(small))
    _load_clip(loaded.tower, 'openai')
    assert all(torch.equal(x, loaded.tower.state_dict()[name]) for name, x in source.tower.state_dict().items())


def test_clip_of_another_size(small):
    with pytest.raises(ValueError, match='14.*336.*32.*64'):
        ClipTextEncoder(replace(small, width=64))


# projector, target, decoder

def projected(layer, x):
    "A projector layer from its weights, without dropout."
    def norm(x, by):
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
        return by.weight * centred / (deviation + 1e-5) + by.bias
    heads = []
    for head in range(layer.heads):
        part = slice(head * x.shape[-1] // layer.heads, (head + 1) * x.shape[-1] // layer.heads)
        q, k, v = (f(x)[..., part] for f in (layer.q, layer.k, layer.v))
        heads.append((q @ k.transpose(1, 2) / q.shape[-1]**0.5).softmax(-1) @ v)
    x = norm(x + layer.out(torch.cat(heads, -1)), layer.norm1)
    return norm(x + layer.fc2(layer.fc1(x).clamp(min=0)), layer.norm2)


def test_projector_written_out():
    config = FlowTokConfig('x', TokenizerConfig(num_tokens=5, token_dim=3), TextConfig(
        length=5, width=12, projector_depth=2, projector_heads=4, projector_hidden=20))
    projector, x = TextProjector(config).eval(), torch.randn(2, 5, 12)
    for p in projector.parameters():
        nn.init.normal_(p, std=0.5)
    expected = x
    for layer in projector.layers:
        expected = projected(layer, expected)
    mean, logvar = projector.linear(expected).split(3, -1)
    posterior = projector(x)
    assert torch.allclose(posterior.mean, mean, atol=1e-4) and torch.allclose(posterior.logvar, logvar, atol=1e-4)


def test_logvar_is_not_clamped():
    projector = TextProjector(tiny)
    nn.init.constant_(projector.linear.bias, 100.)
    assert projector(torch.randn(1, 16, 128)).logvar.min() > 90


def test_dropout_in_training_only():
    layer, x = ProjectorLayer(16, 4, 32, dropout=0.1), torch.randn(4, 7, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    still = ProjectorLayer(16, 4, 32, dropout=0.)
    assert torch.equal(still(x), still(x))


def test_layers_start_as_copies_and_part_ways():
    projector = TextProjector(tiny)
    first, last = projector.layers[0], projector.layers[-1]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), last.parameters()))
    assert not {p.data_ptr() for p in first.parameters()} & {p.data_ptr() for p in last.parameters()}


def test_target_is_made_position_by_position():
    mlp, features = AlignmentMLP(tiny), torch.randn(2, 16, 128)
    assert torch.allclose(mlp(features)[:, 3], mlp(features[:, 3]), atol=1e-6)


def test_decoder_sees_all_positions():
    decoder, tokens = TextDecoder(tiny), torch.randn(1, 16, 16)
    changed = tokens.clone()
    changed[0, 9] += 1
    moved = (decoder(tokens) - decoder(changed)).abs().amax(-1)[0]
    assert decoder(tokens).shape == (1, 16, tiny.text.vocab_size) and (moved > 1e-5).all() and moved.argmax() == 9


@pytest.mark.parametrize('part', [TextProjector, TextDecoder, AlignmentMLP])
def test_everything_learns(part):
    net = part(tiny)
    out = net(torch.randn(2, 16, 16 if part is TextDecoder else 128))
    loss = out.sample(torch.randn_like(out.mean)).square().mean() if part is TextProjector else out.square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
