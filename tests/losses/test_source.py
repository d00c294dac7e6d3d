"The source of text to image: one place decides it, and training and sampling draw the same start."
import json
import math
from dataclasses import replace

import pytest
import torch

from flowtok.config import FlowConfig, FlowTokConfig, SourceConfig, from_json, preset, recipe, to_json
from flowtok.training.checkpointing import collapse_warning
from flowtok.models.flowtok import FlowTok, direction_config
from flowtok.losses.objective import text_to_image_terms
from flowtok.pipeline import FlowTokPipeline
from flowtok.flow.source import sources
from flowtok.training.tasks import plan
from flowtok.models.tokenizer import ImageTokenizer

LEARNED = 'source_std=0 mean_scale=0'
CHANGES = {'kl': f'source=kl {LEARNED} kl_weight=1e-4', 'released_kl': f'source=released_kl {LEARNED} kl_weight=0.01',
           'variance_kl': f'source=variance_kl {LEARNED} kl_weight=0.02 direction_weight=1', 'fixed': 'source=fixed source_std=0.7 mean_scale=3'}


def pipeline(source):
    torch.manual_seed(0)
    config = replace(preset('tiny'), source=source)
    return FlowTokPipeline(config, tokenizer=ImageTokenizer(config), text_to_image=FlowTok(config))


@pytest.mark.parametrize('values', [
    dict(kind='fixed'), dict(kind='fixed', std=-1.), dict(kind='kl', std=.5),
    dict(kind='fixed', std=1., mean_scale=-2.), dict(kind='variance_kl', mean_scale=2.)])
def test_a_source_that_makes_no_sense_is_refused(values):
    with pytest.raises(ValueError):
        SourceConfig(**values)
    with pytest.raises(ValueError):
        replace(recipe('xl', 'text-to-image'), source=values['kind'], source_std=values.get('std', 0.), mean_scale=values.get('mean_scale', 0.))


def test_the_paper_is_the_default_of_the_large_models():
    for scale in ('b', 'xl', 'h'):
        assert preset(scale).source == recipe(scale, 'text-to-image').source_config == SourceConfig('kl')
        assert recipe(scale, 'text-to-image').kl_weight == 1e-4 and preset(scale).sampling.temperature == 1
    assert preset('tiny').source == recipe('tiny', 'text-to-image').source_config and preset('tiny').source.kind == 'fixed'
    assert preset('tiny').sampling.temperature == 1


@pytest.mark.parametrize('kind', sources)
def test_the_recipe_decides_the_source_of_the_config(kind):
    run = plan('text-to-image', 'tiny', changes=CHANGES[kind])
    assert run.config.source.kind == run.recipe.source == kind
    assert from_json(to_json(run.config)) == run.config


def test_an_old_config_loads():
    values = json.loads(to_json(preset('b')))
    del values['source'], values['caption_flow']
    assert from_json(json.dumps(values)) == preset('b')
    small = replace(preset('b'), caption_flow=FlowConfig(2, 64, 4))
    assert from_json(to_json(small)) == small and direction_config(small, 'image-to-text').flow == FlowConfig(2, 64, 4)
    assert direction_config(small, 'text-to-image') == small and direction_config(preset('b'), 'image-to-text') == preset('b')


@pytest.mark.parametrize('temperature', [1., .5, 0.])
def test_sampling_starts_where_training_did(temperature):
    "An untrained velocity is 0, so what comes out is the start: it has the source's mean and standard deviation."
    pipe = pipeline(SourceConfig('fixed', std=.7, mean_scale=3.))
    prompts = ['a red circle'] * 400
    tokens = pipe(prompts, generator=torch.Generator().manual_seed(0), output_type='tokens', temperature=temperature, guidance_scale=1.)
    mean = pipe.text_to_image.source(pipe.text_encoder(pipe.text_encoder.tokenize(prompts[:1]))).mean
    assert abs(mean.std(-1, unbiased=False) - 3).max() < .05
    assert abs((tokens - mean).std() - .7 * temperature) < .01 and (tokens - mean).mean().abs() < .01
    starts = []
    model = FlowTok(pipe.config)
    model.load_state_dict(pipe.text_to_image.state_dict())
    model.velocity = lambda x, t, cond: starts.append((x, t)) or x
    features = pipe.text_encoder(pipe.text_encoder.tokenize(prompts))
    how = replace(plan('text-to-image', 'tiny').recipe, time_sampling='mixture', p_start=1., align_weight=0., direction_weight=0.)
    text_to_image_terms(model, features, torch.zeros(400, 16, 16), how)
    assert abs((starts[0][0] - mean).std() - .7) < .01 and not starts[0][1].any()


def test_a_fixed_source_does_not_learn_its_noise():
    model = pipeline(SourceConfig('fixed', std=.7)).text_to_image
    source = model.source(torch.randn(2, 16, 128))
    assert torch.allclose(source.std, torch.tensor(.7))
    learned = pipeline(SourceConfig('kl')).text_to_image
    assert learned.source(torch.randn(2, 16, 128)).std.std() > 0


def test_one_prompt_has_many_starts():
    pipe = pipeline(SourceConfig('fixed', std=.5, mean_scale=2.))
    one, other = (pipe('a red circle', generator=torch.Generator().manual_seed(k), output_type='tokens') for k in (0, 1))
    assert (one - other).std() > .5


def test_the_run_warns_when_the_noise_dies():
    assert collapse_warning({'step': 3, 'source_snr': 21.}) and not collapse_warning({'step': 3, 'source_snr': 19.})
    assert not collapse_warning({'step': 3, 'flow': 1.})


def test_times_can_be_moved_towards_the_source():
    from flowtok.flow.path import Rng, sample_time
    t = sample_time(20_000, 'logit_normal', mean=-2., std=.5, rng=Rng(torch.Generator().manual_seed(0)))
    assert abs(t.logit().mean() + 2) < .02 and abs(t.logit().std() - .5) < .02
    with pytest.raises(ValueError):
        sample_time(4, 'logit_normal', std=0.)
    assert math.isclose(FlowTokConfig('x').sampling.temperature, 1.)


SMALL_PAPER = replace(preset('b'), flow=FlowConfig(2, 64, 4), text=replace(
    preset('b').text, width=48, projector_heads=4, projector_hidden=64, align_hidden=64))


def two_steps(config, kind):
    "The losses of two optimiser steps of text to image on the features of two captions."
    from flowtok.losses.objective import total
    from flowtok.config import parse_changes
    from flowtok.training.optim import make_optimizers
    torch.manual_seed(0)
    how = replace(recipe('b', 'text-to-image'), **parse_changes(CHANGES[kind]))
    model = FlowTok(replace(config, source=how.source_config))
    optimizers, losses = make_optimizers(model, how), []
    features, tokens = torch.randn(2, 77, config.text.width), torch.randn(2, 77, 16)
    for _ in range(2):
        terms = text_to_image_terms(model, features, tokens, how)
        losses.append(total(terms, how.weights))
        losses[-1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return terms, torch.stack(losses).detach()


@pytest.mark.parametrize('kind', sources)
def test_every_source_trains_with_the_tokens_of_the_paper(kind):
    terms, losses = two_steps(SMALL_PAPER, kind)
    assert losses.isfinite().all() and ('kl' in terms) == (kind != 'fixed') and {'source_snr', 'source_share'} <= terms.keys()


@pytest.mark.slow
@pytest.mark.parametrize('kind', sources)
def test_every_source_trains_at_the_size_of_flowtok_b(kind):
    "About 10 seconds and 4 GB each: python -m pytest -q -m slow tests/test_source.py"
    assert two_steps(preset('b'), kind)[1].isfinite().all()


def test_what_only_training_needs_is_not_saved_with_a_pipeline(tmp_path):
    from safetensors.torch import load_file

    from flowtok.models.flowtok import load_weights, save_weights
    pipe = pipeline(SourceConfig('fixed', std=.5))
    pipe.save_pretrained(tmp_path)
    names = load_file(tmp_path / 'text-to-image.safetensors').keys()
    assert names and not any(name.startswith(('alignment', 'temperature')) for name in names)
    again = FlowTokPipeline.from_pretrained(tmp_path)
    how = dict(output_type='tokens', temperature=0.)
    assert torch.allclose(again('a red circle', **how), pipe('a red circle', **how), atol=2e-2)
    save_weights(pipe.text_to_image, tmp_path / 'all.safetensors')
    assert load_file(tmp_path / 'all.safetensors').keys() == pipe.text_to_image.state_dict().keys()
    with pytest.raises(ValueError):
        partial = {name: x for name, x in load_file(tmp_path / 'text-to-image.safetensors').items() if 'projector' not in name}
        from safetensors.torch import save_file
        save_file(partial, tmp_path / 'partial.safetensors')
        load_weights(FlowTok(pipe.config), tmp_path / 'partial.safetensors')


def test_an_unknown_source_is_refused_before_work():
    with pytest.raises(ValueError, match='variance_kl'):
        plan('text-to-image', 'tiny', changes=f'source=gaussian {LEARNED}')
    with pytest.raises(ValueError, match='variance_kl'):
        FlowTok(replace(preset('tiny'), source=SourceConfig('gaussian')))
