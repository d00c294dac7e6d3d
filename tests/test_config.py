"Sizes and recipes: what is accepted, what is refused, and that nothing is lost on the way to a file and back."
import json
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest

from flowtok.config import (WORDS, FlowConfig, FlowTokConfig, Recipe, SamplingConfig, TextConfig, TokenizerConfig, TokenizerRecipe, changed as changed_recipe, from_json, parse_changes, preset,
                            presets, recipe, stages, to_json)


@pytest.mark.parametrize('name', presets)
def test_every_preset_is_itself_after_a_round_trip(name):
    c = preset(name)
    assert c.name == name and from_json(to_json(c)) == c
    assert c.tokenizer.num_tokens == c.text.length
    assert c.tokenizer.num_tokens < (c.tokenizer.image_size // c.tokenizer.patch_size)**2


def test_table_1():
    sizes = {name: (c.flow.depth, c.flow.width, c.flow.heads) for name, c in presets.items()}
    assert sizes | {'b': (12, 768, 12), 'xl': (28, 1152, 16), 'h': (36, 1280, 20)} == sizes
    assert len({(c.tokenizer, c.text) for name, c in presets.items() if name not in ('tiny', 'small')}) == 1


def test_configs_are_frozen_and_hashable():
    with pytest.raises(FrozenInstanceError):
        preset('b').flow.width = 1
    assert len(set(presets.values())) == len(presets)


@pytest.mark.parametrize('scale', presets)
@pytest.mark.parametrize('stage', stages)
def test_every_recipe_is_itself_after_a_round_trip(scale, stage):
    r = recipe(scale, stage)
    assert from_json(to_json(r), type(r)) == r
    assert (r.optimizer == 'muon') == (r.matrix_learning_rate > 0)


def test_table_6():
    r = asdict(recipe('xl', 'text-to-image'))
    wanted = dict(steps=1_000_000, batch_size=4096, optimizer='adamw', learning_rate=4e-4, betas=(.9, .95),
                  weight_decay=.03, warmup=5000, schedule='constant', ema=.9999, precision='bf16',
                  indicator_probability=.1, time_sampling='logit_normal', kl_weight=1e-4, align_weight=1., clip=0.,
                  source='kl', source_std=0., direction_weight=0., image_noise=1.)
    assert {name: r[name] for name in wanted} == wanted
    assert recipe('xl', 'image-to-text').weights == {'flow': 1.}


def test_the_tokenizers_recipe_has_critics_and_no_other():
    r = asdict(recipe('xl', 'tokenizer'))
    critics = dict(perceptual_weight=1.1, convnext_share=.1, gan_weight=.1, gan_start=200_000, gan_learning_rate=1e-4,
                   lecam_weight=1e-3)
    assert {name: r[name] for name in critics} == critics
    others = [recipe('tiny', stage) for stage in stages] + [recipe('xl', stage) for stage in stages[1:]]
    assert not any(getattr(other, name, 0) for other in others for name in critics)


@pytest.mark.parametrize('make, named', (
    (lambda: preset('XL'), 'XL.*tiny.*small.*xl'),
    (lambda: preset(''), 'tiny'),
    (lambda: recipe('m', 'text'), 'tiny'),
    (lambda: recipe('b', 'texts'), 'tokenizer'),
    (lambda: TokenizerConfig(positions='sine'), 'rope.*learned.*sine'),
    (lambda: TokenizerConfig(image_size=0), 'image_size'),
    (lambda: TokenizerConfig(image_size=250), 'image_size'),
    (lambda: TokenizerConfig(patch_size=0), 'patch_size'),
    (lambda: TokenizerConfig(encoder_width=72, encoder_heads=12), '72.*12'),
    (lambda: TokenizerConfig(decoder_heads=0), 'decoder'),
    (lambda: TokenizerConfig(anchored=True), '77'),
    (lambda: TokenizerConfig(anchored=True, num_tokens=9), '16'),
    (lambda: TokenizerConfig(anchored=True, num_tokens=16, positions='learned'), 'positions|rotary'),
    (lambda: TextConfig(encoder='bert'), 'clip.*words.*bert'),
    (lambda: TextConfig(activation='relu'), 'quick_gelu.*gelu.*relu'),
    (lambda: TextConfig('words', vocabulary=('a',)), '3'),
    (lambda: TextConfig(width=100), '100'),
    (lambda: FlowConfig(heads=5), '5'),
    (lambda: Recipe(-1, 1), 'steps'),
    (lambda: Recipe(1, 0), 'batch_size'),
    (lambda: Recipe(1, 1, learning_rate=float('nan')), 'learning_rate'),
    (lambda: Recipe(1, 1, ema=1.5), 'ema'),
    (lambda: TokenizerRecipe(1, 1, gan_weight=.1), 'gan_learning_rate'),
    (lambda: TokenizerRecipe(1, 1, gan_start=-1), 'gan_start'),
    (lambda: Recipe(1, 1, schedule='linear'), 'linear.*constant.*cosine'),
    (lambda: Recipe(1, 1, precision='fp8'), 'fp8.*fp32.*bf16'),
))
def test_senseless_values_are_refused_in_one_sentence(make, named):
    with pytest.raises(ValueError, match=named) as error:
        make()
    assert '\n' not in str(error.value) and str(error.value).endswith('.')


def changed(change):
    values = asdict(preset('tiny'))
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize('text, named', (
    ('{', 'JSON'),
    ('[]', 'JSON'),
    (changed(lambda v: v.update(flow=3)), 'flow.*3'),
    (changed(lambda v: v.pop('text')), 'text'),
    (changed(lambda v: v['text'].pop('length')), 'text.*length'),
    (changed(lambda v: v['tokenizer'].update(colour='red')), 'colour.*image_size'),
    (changed(lambda v: v['tokenizer'].update(anchored=1)), 'anchored.*bool.*1'),
    (changed(lambda v: v['flow'].update(depth=2.5)), 'depth.*int.*2.5'),
    (changed(lambda v: v['flow'].update(depth=True)), 'depth.*int.*True'),
    (changed(lambda v: v['flow'].update(heads=3)), '3'),
))
def test_files_are_read_strictly(text, named):
    with pytest.raises(ValueError, match=named):
        from_json(text)


def test_a_whole_number_will_do_for_a_real_one():
    assert from_json(changed(lambda v: v['tokenizer'].update(rope_theta=10))) == preset('tiny')


def test_words():
    tiny = preset('tiny').text
    assert tiny.vocabulary == WORDS and tiny.vocab_size == len(set(WORDS)) + 2
    assert all(word == word.lower() and ' ' not in word for word in WORDS)


def test_defaults_are_the_papers():
    assert replace(FlowTokConfig('b')) == preset('b')
    assert {f.name for f in fields(FlowTokConfig)} == {'name', 'tokenizer', 'text', 'flow', 'sampling', 'source', 'caption_flow', 'guided', 'both'}
    assert asdict(preset('xl').sampling) == dict(steps=20, guidance=2., guidance_interval=(0., 1.), temperature=1., caption_steps=20, caption_guidance=2.,
                                                 schedule='uniform')


def test_an_interval_of_guidance_is_checked_and_survives_json():
    for bad in ((.5, .2), (0., 1.5), (-.1, 1.), (0.,)):
        with pytest.raises(ValueError):
            SamplingConfig(guidance_interval=bad)
    assert from_json(to_json(preset('tiny'))).sampling.guidance_interval == preset('tiny').sampling.guidance_interval
    older = json.loads(to_json(preset('tiny')))
    del older['sampling']['guidance_interval']
    assert from_json(json.dumps(older)).sampling.guidance_interval == (0., 1.)


def test_a_recipe_of_an_older_version_is_read():
    saved = json.loads(to_json(recipe('tiny', 'both')))
    for name in ('text_noise', 'reverse_share', 'reverse_weight', 'caption_share', 'caption_weight', 'flow_map'):
        saved.pop(name)
    assert from_json(json.dumps(saved), type(recipe('tiny', 'both'))) == replace(recipe('tiny', 'both'), reverse_share=0., caption_weight=0.)


def test_changes_reach_every_stage_that_has_the_field_and_no_other():
    changes = parse_changes('ema=0.5 whiten=false margin=0.2', *stages)
    made = {stage: changed_recipe(recipe('tiny', stage), changes) for stage in stages}
    assert all(r.ema == .5 for r in made.values()) and not made['tokenizer'].whiten and made['text-to-image'].margin == .2
    assert not hasattr(made['text'], 'margin')
    for wanted, text in ((('text',), 'margin=0.2'), (stages, 'margn=0.2'), (stages, 'ema=high')):
        with pytest.raises(ValueError):
            parse_changes(text, *wanted)
