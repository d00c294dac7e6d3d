"One network for both directions, and flow maps: from the plan to a pipeline that draws and captions."
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flowtok.config import every_stage, from_json, preset, recipe
from flowtok.data.images import read_shard
from flowtok.data.mixture import DataSource, TokenReader, captions_of
from flowtok.toy.shapes import write_shards
from flowtok.flow.path import Rng
from flowtok.flow.solver import Sampling
from flowtok.flow.source import Source
from flowtok.losses.objective import reverse_terms
from flowtok.models.flowtok import FlowTok, TwoWayFlowTok, load_weights, save_weights
from flowtok.models.text import TextAutoencoder
from flowtok.models.tokenizer import ImageTokenizer
from flowtok.pipeline import FlowTokPipeline
from flowtok.training.fit import cache_tokens, train
from flowtok.training.tasks import BothStage, plan, stage_classes, weights_file


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder with tokenizer, text and text to image, untrained, and the token cache of 64 scenes."
    folder, config = tmp_path_factory.mktemp('both'), preset('tiny')
    write_shards(folder / 'scenes', 'train', 64)
    torch.manual_seed(0)
    flow = FlowTok(config)
    for p in flow.dit.parameters():
        torch.nn.init.normal_(p, std=.05) if p.requires_grad else None
    for stage, module in (('tokenizer', ImageTokenizer(config)), ('text', TextAutoencoder(config)), ('text-to-image', flow)):
        save_weights(module, weights_file(folder, stage), stage=stage)
    cache_tokens(run(folder, folder))
    return folder


def run(folder, out, stage='both', **changes):
    "Four steps of a stage, on the cached tokens."
    return plan(stage, 'tiny', folder / 'scenes' if out == folder else folder / 'tokens', out, steps=4, batch_size=8, init=str(folder), changes=changes)


def lines(run): return [json.loads(line) for line in (run.folder / 'log.jsonl').read_text().splitlines()]


ARMS = {'reversal': dict(reverse_share=.25), 'source alone': dict(reverse_share=.25, reverse_weight=0.), 'direction': dict(reverse_share=0., caption_share=.5), 'own indicator': dict(reverse_share=.25, reverse_indicator=True), 'flow map': dict(flow_map='consistency')}


@pytest.mark.parametrize('arm', ARMS)
def test_one_network_is_trained_saved_and_does_both_tasks(folder, tmp_path, arm):
    one = run(folder, tmp_path, **ARMS[arm])
    train(one)
    config = from_json((tmp_path / 'config.json').read_text())
    assert config.both == replace(config.flow, flow_map=arm == 'flow map', directions=2 if arm in ('direction', 'own indicator') else 1)
    log = lines(one)[0]
    assert ('caption' in log) == (arm != 'direction') and ('caption flow' in log) == (arm == 'direction')
    assert any(name.startswith('error t<=') for name in log) == (arm == 'flow map')          # by beginning and length of the steps
    pipe = FlowTokPipeline.from_pretrained(tmp_path)
    assert pipe.tasks == ('text-to-image', 'image-to-text') and pipe.parts_for('image-to-text') == ('tokenizer', 'both')
    images = pipe(['a red star', 'a blue ring'], generator=torch.Generator().manual_seed(0), output_type='pt')
    captions = pipe.caption(images)
    assert images.shape == (2, 3, 64, 64) and len(captions) == 2
    (tmp_path / 'alone').mkdir()
    pipe.save_pretrained(tmp_path / 'alone', ['tokenizer', 'both'], dtype=torch.float32)      # half of the networks
    again = FlowTokPipeline.from_pretrained(tmp_path / 'alone')
    assert again.caption(images) == captions and again.parts.keys() == {'tokenizer', 'both'}
    assert torch.equal(again(['a red star', 'a blue ring'], generator=torch.Generator().manual_seed(0), output_type='pt'), images)
    again.optimize()
    assert torch.allclose(again(['a red star', 'a blue ring'], generator=torch.Generator().manual_seed(0), output_type='pt'), images, atol=1e-4)
    for call in (lambda: pipe.caption(images, guidance_scale=3.), lambda: pipe.caption(images, guidance_scale=float('nan'))):
        with pytest.raises(ValueError):
            call()
    if arm == 'flow map':                                                                    # its guidance is in the weights, its steps have no solver
        assert config.sampling.steps == 4 and config.guided == ('image-to-text',)
        for wrong in (dict(guidance_scale=2.), dict(solver='heun'), dict(guidance_interval=(0., .2))):
            with pytest.raises(ValueError):
                pipe('a red star', **wrong)


def test_a_flow_map_starts_as_its_teacher_and_keeps_the_source(folder, tmp_path):
    one = run(folder, tmp_path, 'text-to-image', flow_map='mean_flow')
    stage = stage_classes[one.stage](one)
    x, t = torch.randn(4, 16, 16), torch.tensor([0., .1, .5, 1.])
    plain = FlowTok(preset('tiny'))
    plain.load_state_dict({name: value for name, value in stage.trained.state_dict().items() if 'duration' not in name})
    for s in (t, 1 - t, torch.ones(4)):
        assert torch.equal(stage.trained.velocity(x, t, 0, s), plain.velocity(x, t, 0))
    assert stage.teacher in stage.children() and not any(p.requires_grad for p in stage.teacher.parameters())      # moves with the stage
    assert not any(name.startswith('teacher') for name in stage.trained.state_dict())
    assert not any(p.requires_grad for p in stage.trained.projector.parameters()) and stage.trained.dit.duration.mlp[2].weight.requires_grad
    train(one)
    saved = from_json((tmp_path / 'config.json').read_text())
    assert saved.flow.flow_map and not saved.caption_flow.flow_map
    pipe = FlowTokPipeline.from_pretrained(tmp_path)
    assert all(pipe('a red star', num_inference_steps=k)[0].size == (64, 64) for k in (1, 2, 4))
    before, after = (load_file(weights_file(place, 'text-to-image')) for place in (folder, tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith('dit.') for name in changed)


def test_captions_of_the_way_back_are_first_ones(folder):
    reader = TokenReader(16, pair=True)
    sample = next(iter(read_shard(str(next((folder / 'tokens').glob('*.tar'))), Counter())))
    all_of_them, rng = captions_of(sample, DataSource('x').caption_key), np.random.default_rng(0)
    pairs = [reader(sample, DataSource('x'), rng)[1] for _ in range(40)]
    assert {first for _, first in pairs} == {all_of_them[0]} and {any_one for any_one, _ in pairs} == set(all_of_them)


@pytest.mark.parametrize('wrong', [
    dict(changes='flow_map=consistency'), dict(changes='flow_map=consistency', init='nowhere'), dict(changes='flow_map=fast'),
    dict(changes='reverse_share=2'), dict(changes='caption_weight=-1')])
def test_bad_plans_are_refused_before_work_starts(wrong, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)):
        plan('both', 'tiny', 'nowhere', tmp_path, **wrong)
    with pytest.raises(ValueError):
        plan('image-to-text', 'tiny', 'nowhere', tmp_path, init=str(tmp_path), changes='flow_map=consistency')


def test_a_flow_map_without_a_flow_to_learn_from_is_refused(folder, tmp_path):
    (tmp_path / 'init').mkdir()
    one = replace(run(folder, tmp_path, flow_map='consistency'), init=str(tmp_path / 'init'))
    for stage in ('tokenizer', 'text'):
        weights_file(tmp_path, stage).write_bytes(weights_file(folder, stage).read_bytes())
    with pytest.raises(FileNotFoundError):
        BothStage(one)


def test_one_network_has_about_half_the_parameters_of_two():
    for scale in ('b', 'xl'):
        with torch.device('meta'):
            one, two = [TwoWayFlowTok(preset(scale))], [FlowTok(preset(scale)), FlowTok(preset(scale)), TextAutoencoder(preset(scale))]
        count = [sum(p.numel() for module in modules for p in module.parameters()) for modules in (one, two)]
        assert count[0] < .6 * count[1]
    assert every_stage[-1] == 'both' and recipe('xl', 'both').reverse_share > 0


def test_the_config_of_a_folder_is_that_of_the_stage_that_draws(folder, tmp_path):
    "A flow map draws in four steps without guidance, whatever is trained beside it afterwards."
    from flowtok.config import to_json
    from flowtok.training.checkpointing import merge_config
    one = run(folder, tmp_path, flow_map='consistency')
    (tmp_path / 'config.json').write_text(to_json(merge_config(one)))
    weights_file(tmp_path, 'both').write_bytes(b'')
    after = merge_config(run(folder, tmp_path, 'image-to-text'))
    assert after.sampling.steps == 4 and after.both.flow_map and after.guided == ('image-to-text',) and after.source == one.config.source
    assert merge_config(run(folder, tmp_path, 'text-to-image')).both.flow_map               # `both` goes before it


@pytest.fixture(scope='module')
def folder_b(tmp_path_factory):
    "The same at the size of FlowTok-B, with eight scenes of 256 px; random weights of CLIP."
    folder, config = tmp_path_factory.mktemp('b'), preset('b')
    write_shards(folder / 'scenes', 'train', 8, size=256)
    torch.manual_seed(0)
    for stage, build in (('tokenizer', ImageTokenizer), ('text', TextAutoencoder), ('text-to-image', FlowTok)):
        save_weights(build(config), weights_file(folder, stage), stage=stage)
    cache_tokens(plan('both', 'b', folder / 'scenes', folder, steps=2, batch_size=2))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('arm', [*ARMS, 'mean flow', 'shortcut'])
def test_every_arm_trains_at_the_size_of_flowtok_b(folder_b, tmp_path, arm):
    "Some minutes and 12 GB: python -m pytest -q -m slow tests/training/test_both.py"
    changes = ARMS.get(arm) or {'flow_map': arm.replace(' ', '_')}
    one = plan('both', 'b', folder_b / 'tokens', tmp_path, steps=2, batch_size=2, init=str(folder_b), changes=changes | {'precision': 'fp32'})
    train(one)
    assert all(np.isfinite(value) for line in lines(one) for value in line.values() if isinstance(value, float))
    before, after = load_file(weights_file(folder_b, 'text-to-image')), load_file(one.weights)
    assert any(not torch.equal(before[name], after[name]) for name in before if name in after)


@pytest.mark.parametrize('arm', [dict(caption_share=1.), dict(reverse_share=1., reverse_indicator=True)])
def test_the_way_back_is_trained_as_it_is_followed(folder, tmp_path, arm):
    "The velocity that leads from an image's tokens straight back to its caption's has no loss, and following it arrives there."
    one = run(folder, tmp_path, **dict(reverse_share=0.) | arm, image_noise=0., text_noise=0.)
    stage = BothStage(one)
    batch = {'moments': torch.randn(8, 16, 32), 'ids': torch.randint(51, (8, 16)), 'first_ids': torch.randint(51, (8, 16))}
    with torch.no_grad():
        images = stage.image_tokens(batch['moments'])
        text = stage.projector(stage.features(batch['first_ids'])).mean if 'caption_share' in arm else images * 0 + 1
    if 'reverse_share' in arm:
        stage.trained.source = lambda features: Source(text, torch.full_like(text, -60.))
    def velocity(x, t, cond, s=None):
        back = torch.as_tensor(cond['indicator']).reshape(-1, 1, 1) >= 2
        return torch.where(back, images - text, torch.zeros_like(images))
    stage.trained.velocity = velocity
    if 'caption_share' in arm:
        assert stage(batch, Rng())['caption flow'].abs().max() < 1e-10
    else:
        assert reverse_terms(stage.trained, stage.features(batch['first_ids']), images, batch['first_ids'])['reverse'].abs().max() < 1e-10
    for steps in (1, 3):
        assert torch.allclose(stage.trained.generate(images, Sampling(steps, 1.), stage.trained.backward_cond, reverse=True), text, atol=1e-5)


def test_released_weights_are_fine_tuned_for_both_directions(folder, tmp_path):
    "Tokenizer and flow as a pipeline saves them, without text autoencoder: its decoder learns to read the flow's own start."
    released, out = tmp_path / 'released', tmp_path / 'out'
    parts = {stage.replace('-', '_'): load_weights(build(preset('tiny')), weights_file(folder, stage), stage) for stage, build in (('tokenizer', ImageTokenizer), ('text-to-image', FlowTok))}
    FlowTokPipeline(preset('tiny'), **parts).save_pretrained(released, dtype=torch.float32)
    for stage in ('text', 'both'):
        one = plan(stage, 'tiny', folder / 'tokens' if stage == 'both' else folder / 'scenes', out, phase='fine-tuning', steps=3, batch_size=8, init=str(released))
        train(one)
    flow, text, both = (load_file(weights_file(*place)) for place in ((released, 'text-to-image'), (out, 'text'), (out, 'both')))
    for name in (name for name in flow if name.startswith('projector.')):
        assert torch.equal(flow[name], text[name])
    assert any(not torch.equal(flow[name], both[name]) for name in flow if name.startswith('dit.'))
    assert recipe('xl', 'both', 'fine-tuning').learning_rate == recipe('xl', 'both').learning_rate / 2
    pipe = FlowTokPipeline.from_pretrained(out)
    assert len(pipe.caption(pipe(['a red star'], generator=torch.Generator().manual_seed(0)))) == 1
