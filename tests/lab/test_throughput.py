"""The fast path gives what the straightforward one gives, at every size's shape; the benchmark counts right. No times are asserted."""
import copy
import csv
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowtok.lab.throughput import (_compare_sampling, _compare_training, _compile_row, _make_batch, make_pipeline, _make_stage, _break_even, run_benchmark,
                           some_prompts, _stage_rows, _whole_image)
from flowtok.config import FlowConfig, preset, stages
from flowtok.lab.roofline import evaluations, image_operations, stage_costs, training_operations
from flowtok.flow.path import Rng
from flowtok.flow.solver import Sampling, guide
from flowtok.models.flowtok import FlowTok
from flowtok.losses.objective import total
from flowtok.pipeline import FlowTokPipeline
from flowtok.lab.reference import make_noise, plain_generate, _plain_velocity, relative
from flowtok.lab.records import read_record
from flowtok.training.optim import cpu_has_bf16


def shrunken(name):
    "The shape of a size of the paper, shallow and narrow: its width a head, its tokens, its tokenizer with patches of 16."
    config = preset(name)
    tokens = replace(config.tokenizer, image_size=64, encoder_width=64, encoder_depth=1, encoder_heads=4, decoder_width=64, decoder_depth=2,
                     decoder_heads=4)
    text = replace(preset('tiny').text, length=77, width=64, projector_hidden=96, projector_depth=2, projector_heads=4)
    return replace(config, tokenizer=tokens, text=text, flow=FlowConfig(3, 2 * config.flow.width // config.flow.heads, 2))


@pytest.fixture(scope='module', params=['tiny', 'b', 'xl', 'h'])
def pipe(request):
    return make_pipeline(preset('tiny') if request.param == 'tiny' else shrunken(request.param))


@pytest.mark.parametrize('guidance', [1., 2.])
@pytest.mark.parametrize('n, batch_size', [(1, 4), (5, 2), (4, 4)])
def test_pipeline_is_the_straightforward_version(pipe, guidance, n, batch_size):
    prompts, (noise, generators) = some_prompts(pipe.config, n), make_noise(pipe, n)
    plain = plain_generate(pipe, prompts, 4, guidance, noise)
    assert relative(pipe(prompts, 4, guidance, generators, 'pt', batch_size=batch_size, guidance_interval=(0., 1.)), plain) < 1e-4
    tokens = plain_generate(pipe, prompts, 4, guidance, noise, decode=False)
    assert relative(pipe(prompts, 4, guidance, make_noise(pipe, n)[1], 'tokens', batch_size=batch_size, guidance_interval=(0., 1.)), tokens) < 1e-4


def plain_euler(dit, x, steps, guidance, interval):
    "The straightforward loop with guidance inside an interval."
    zeros = torch.zeros(len(x), dtype=torch.long)
    for i in range(steps):
        t = torch.full((len(x),), i / steps)
        v = _plain_velocity(dit, x, t, zeros)
        if guidance != 1 and interval[0] <= i / steps <= interval[1]:
            v = guide(v, _plain_velocity(dit, x, t, zeros + 1), guidance)
        x = x + v / steps
    return x


@pytest.mark.parametrize('interval', [(0., 1.), (.2, .6), (1., 1.)])
def test_guidance_interval_is_the_straightforward_one(pipe, interval):
    x = torch.randn(3, pipe.config.tokenizer.num_tokens, 16)
    with torch.no_grad():
        plain = plain_euler(pipe.text_to_image.dit, x, 5, 3., interval)
    found = pipe.text_to_image.generate(x, Sampling(5, 3., interval))
    assert relative(found, plain) < 1e-4


@pytest.mark.parametrize('solver', ['euler', 'midpoint', 'heun'])
def test_every_solver_asks_at_the_right_times(pipe, solver):
    x, how = torch.randn(2, pipe.config.tokenizer.num_tokens, 16), Sampling(solver=solver, times=(0., .1, .5, 1.))
    assert relative(copy.deepcopy(pipe).optimize().text_to_image.generate(x, how), pipe.text_to_image.generate(x, how)) < 1e-4


def test_captions_are_those_of_the_straightforward_loop():
    pipe = FlowTokPipeline.from_pretrained()
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for steps, guidance in ((1, 2.), (4, 2.), (3, 1.)):
        with torch.no_grad():
            x0 = pipe.tokenizer.to_flow(pipe.tokenizer.encode(images).mean)
            x1 = plain_euler(pipe.image_to_text.dit, x0, steps, guidance, (0., 1.))
            plain = pipe.text_encoder.decode_ids(pipe.text.decoder(x1).argmax(-1))
        assert pipe.caption(images, steps, guidance, batch_size=2) == plain


def test_costs_add_up():
    for name in ('tiny', 's', 'b', 'l', 'xl', 'h'):
        config, costs = preset(name), stage_costs(preset(name))
        assert image_operations(config, 20) == sum(n * costs[stage].operations for stage, n in evaluations(20).items())
        assert image_operations(config, 20, False) < image_operations(config, 20) < image_operations(config, 40)
        assert all(training_operations(config, stage) > 3 * costs['velocity'].operations for stage in stages[2:] if stage == 'text-to-image' or not config.caption_flow)
    weights = sum(p.numel() for block in FlowTok(preset('tiny')).dit.blocks for part in (block.attn, block.mlp) for p in part.parameters() if p.dim() > 1)
    assert stage_costs(preset('tiny'))['velocity'].weights == weights + 2 * 16 * preset('tiny').flow.width


@pytest.mark.parametrize('stage', stages)
@pytest.mark.parametrize('size', ['tiny', 'b'])
def test_operations_of_a_training_step_are_those_that_pytorch_counts(stage, size):
    config = preset('tiny') if size == 'tiny' else replace(shrunken('b'), text=replace(shrunken('b').text, decoder_width=96, decoder_heads=4))
    learner = _make_stage(config, stage)
    batch, counter = _make_batch(learner, 3), FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):                                  # the fused kernel of a CPU is not counted
        total(learner(batch, Rng(torch.Generator().manual_seed(0))), learner.weights).backward()
    assert counter.get_total_flops() == pytest.approx(3 * training_operations(config, stage), rel=.05)


@pytest.mark.parametrize('stage', stages)
def test_first_loss_is_that_of_the_plain_loop(stage):
    compared = _compare_training(preset('tiny'), stage, 4, 1)
    most = dict(zip(('training loop fp32', 'training loop bf16'), (1e-5, .02)[:1 + cpu_has_bf16()]))
    assert list(compared.times) == ['plain loop fp32', *most] == list(compared.memory) and list(compared.differences) == list(most)
    assert all(compared.differences[name] < most[name] for name in most)


def test_a_flow_of_the_benchmark_learns_what_the_stage_learns():
    for stage in stages[2:]:
        learner = _make_stage(preset('tiny'), stage)
        learned = {name.split('.')[0] for name, p in learner.trained.named_parameters() if p.requires_grad}
        assert ('projector' in learned) == ('alignment' in learned) == (stage == 'text-to-image') and 'dit' in learned


def test_a_whole_benchmark_of_the_small_size():
    found = run_benchmark('tiny', 3, 2, 1, 4, tell=lambda line: None)
    assert found['sampling'][0]['version'] == 'straightforward fp32' and float(found['sampling'][1]['relative difference']) < 1e-4
    assert [row['stage'] for row in found['stages'][:5]] == [*evaluations(2), 'whole image']
    assert {row['precision'] for row in found['stages']} == {row['version'].split()[-1] for row in found['sampling']}
    assert [row['stage'] for row in found['training']] == [stage for stage in stages for _ in range(2 + cpu_has_bf16())] and 'compile' not in found
    for row in found['training']:
        samples = 1 if row['stage'] == 'tokenizer' else 4
        assert row['samples'] == samples and row['tokens a second'] == pytest.approx(16 * samples / row['seconds'])
        speed = samples * training_operations(preset('tiny'), row['stage']) / row['seconds']
        assert row['share of ceiling'] == pytest.approx(speed / found['ceilings'][row['version'].split()[-1]])
    wholes = [row for row in found['stages'] if row['stage'] == 'whole image']
    for whole, version in zip(wholes, found['sampling'][2:], strict=True):
        assert whole['Gops a call'] == pytest.approx(3 * image_operations(preset('tiny'), 2) / 1e9)
        assert whole['measured, ms'] == pytest.approx(1e3 * version['seconds']) and whole['precision'] in version['version']
    assert wholes[0]['share of ceiling'] == pytest.approx(found['sampling'][2]['share of ceiling'])
    assert {'torch.optim.AdamW', 'flowtok.training.optim.Muon'} <= {row['optimizer'] for row in found['muon']} and all(row['seconds a step'] > 0 for row in found['muon'])
    assert [row['version'] for row in found['tricks']] == ['plain', 'fused GELU', 'aligned SwiGLU', 'cached modulation', 'optimize()'] * (1 + torch.cuda.is_available())
    assert found['tricks'][0]['gain (%)'] == 0
    assert all(float(row['relative difference']) <= (1e-5 if row['precision'] == 'fp32' else .05) and row['seconds'] > 0 for row in found['tricks'])


def test_whole_image_adds_up_in_each_precision():
    rows = [{'stage': 'text tower', 'precision': 'fp32', 'calls': 1, 'Gops a call': 8., 'MB of weights': 3., 'floor, ms': 2., 'measured, ms': 4., 'share of ceiling': .5},
            {'stage': 'velocity', 'precision': 'bf16', 'calls': 20, 'Gops a call': 1., 'MB of weights': 2., 'floor, ms': .1, 'measured, ms': .2, 'share of ceiling': .5}]
    whole = _whole_image(rows, [.007, .008, .010])
    assert whole['Gops a call'] == 28 and whole['MB of weights'] == 5 and whole['floor, ms'] == pytest.approx(4.) and whole['precision'] == 'bf16'
    assert whole['share of ceiling'] == pytest.approx(4 / 8) and whole['measured, ms'] == 8


def test_compiling_that_fails_is_not_measured(monkeypatch):
    def failing(*given, **named): raise RuntimeError('no compiler was found\nand more')
    monkeypatch.setattr(torch, 'compile', failing)
    row = _compile_row(FlowTokPipeline.from_pretrained(), 1, 1)
    assert row['pays from so many images'] == 'not measured: RuntimeError: no compiler was found'


def test_compiling_is_weighed_against_what_it_saves(monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda call, **named: call)
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **named: None)
    row = _compile_row(FlowTokPipeline.from_pretrained(), 2, 1, repeats=1)
    saved = (row['seconds a call, eager'] - row['seconds a call, compiled']) / 2
    assert float(row['relative difference']) == 0 and row['images a call'] == 2
    assert row['pays from so many images'] == ('never here' if saved <= 0 else pytest.approx(row['seconds of compiling'] / saved, abs=1))
    assert _break_even(10., 1., .5) == 20 and _break_even(10., 1., 1.) == 'never here'


def test_half_precision_is_close_and_told_apart():
    pipe = FlowTokPipeline.from_pretrained()
    differences = _compare_sampling(pipe, 2, 2, repeats=1).differences
    assert differences['pipeline fp32'] < 1e-4 and differences['optimised fp32'] < 1e-4 and differences.get('optimised bf16', 0.) < .1
    assert _stage_rows(pipe, 2, 2, {'fp32': 1e9, 'copy': 1e9}, repeats=1)[0]['precision'] == 'fp32'


def test_command_line(tmp_path):
    def run(*words):
        return subprocess.run([sys.executable, '-m', 'flowtok.cli', 'bench', *words], capture_output=True, text=True)
    assert '--batch-size' in run('--help').stdout
    bad = run('--steps', '0')
    assert bad.returncode == 1 and len(bad.stderr.splitlines()) == 1
    done = run('--scale', 'tiny', '--batch-size', '2', '--steps', '2', '--repeats', '1', '--train', '4', '--out', str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f'{name}.{kind}' for name in ('sampling', 'tricks', 'stages', 'muon', 'training') for kind in ('csv', 'md')} | {'result.json'}
    assert read_record(tmp_path).label() == 'tiny, reduced, stand-in random weights'
    assert all(word in done.stdout for word in ('straightforward', 'whole image', 'MB more', 'tokens a second', *stages))
    with open(tmp_path / 'training.csv', newline='') as file:
        assert all(float(row['share of ceiling']) > 0 and row['MB more'] for row in csv.DictReader(file))


def test_frozen_networks_answer_as_in_use():
    "Dropout of the frozen text projector would make other targets for image to text."
    for name in stages:
        stage = _make_stage(preset('tiny'), name)
        learning = {id(m) for m in stage.trained.modules()}
        assert stage.training and stage.trained.training
        assert not any(m.training for child in stage.children() if child is not stage.trained for m in child.modules() if id(m) not in learning)
        assert not any(m.training for m in stage.eval().modules())
