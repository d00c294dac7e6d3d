"""The training engine: optimisers, averages, checkpoints, stopping and going on, two processes."""
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from made import write
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flowtok.training import optim as stepping
from flowtok.training import fit as engine
from flowtok.config import from_json, preset, recipe, stages, to_json
from flowtok.training.checkpointing import Log, Stopped, checkpoints, newest_state, save_checkpoint, _save_state
from flowtok.models.flowtok import load_weights
from flowtok.pipeline import FlowTokPipeline
from flowtok.toy.shapes import write_shards
from flowtok.training.tasks import Run, plan, read_run
from flowtok.config import parse_changes
from flowtok.training.optim import Critics, Ema, ShardedRng, make_optimizers, learning_rate_factor, training_steps
from flowtok.models.text import TextAutoencoder
from flowtok.models.tokenizer import ImageTokenizer
from flowtok.training.fit import cache_tokens, train
from flowtok.training.launch import launch, training_seconds, watch


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shards')
    write_shards(folder, 'train', 64)
    return str(folder)


def short(stage, shards, out, steps=3, **recipe_values):
    quick = replace(recipe('tiny', stage), **{'steps': steps, 'batch_size': 8, 'warmup': 1} | recipe_values)
    return Run(stage, preset('tiny'), quick, shards, str(out), log_every=1, save_every=2)


def test_muon_takes_the_inner_matrices_and_adamw_all_else():
    module = ImageTokenizer(preset('tiny'))
    muon, adamw = make_optimizers(module, recipe('tiny', 'tokenizer'))
    inner = {id(p) for group in muon.param_groups for p in group['params']}
    rest = {id(p) for group in adamw.param_groups for p in group['params']}
    assert not inner & rest and len(inner) + len(rest) == len(list(module.parameters()))
    assert id(module.encoder.blocks[0].attn.qkv.weight) in inner and id(module.latent_tokens) in rest


def test_rate_follows_warmup_and_cosine():
    r = replace(recipe('tiny', 'text'), steps=100, warmup=10, schedule='cosine', final_share=.1)
    assert [round(learning_rate_factor(s, r), 3) for s in (0, 5, 100)] == [0, round(.5 * learning_rate_factor(5, replace(r, warmup=0)), 3), .1]


def test_average_swaps_in_and_out():
    layer = nn.Linear(2, 2)
    ema = Ema(layer, .5)
    before = layer.weight.detach().clone()
    layer.weight.data += 1
    with ema.applied():
        assert torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, before + 1)


def test_log_forgets_what_a_resumed_run_does_again(tmp_path):
    log = Log(tmp_path / 'log.jsonl')
    for step in (1, 2, 3):
        log.add({'loss': float(step)})
        log.write(step=step)
    Log(tmp_path / 'log.jsonl', keep=2)
    assert [json.loads(line)['step'] for line in (tmp_path / 'log.jsonl').read_text().splitlines()] == [1, 2]


def test_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / 'state.pt'
    _save_state(path, step=1)

    def full(fd):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match=f'{path}'):
        _save_state(path, step=2)
    assert torch.load(path, weights_only=True) == {'step': 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == 'nt', reason='no limits of processes there')
def test_a_write_that_breaks_off_keeps_the_old_checkpoint(tmp_path):
    import resource
    path, limits = tmp_path / 'state.pt', resource.getrlimit(resource.RLIMIT_FSIZE)
    _save_state(path, step=1)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)               # the kernel then ends the write with an error
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f'{path}'):
            _save_state(path, weights=torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert torch.load(path, weights_only=True) == {'step': 1} and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match=r'state\.pt'):
        _save_state(tmp_path / 'file' / 'state.pt', step=2)


def test_a_broken_checkpoint_is_passed_over(tmp_path, capsys):
    run = plan('text', out=tmp_path)
    for step in (1, 2, 3):
        save_checkpoint(run, step=step)
    assert [path.name for path in checkpoints(run)] == ['00000002.pt', '00000003.pt']
    checkpoints(run)[-1].write_bytes(b'PK')
    assert newest_state(run) == {'step': 2} and '00000003.pt cannot be read' in capsys.readouterr().err
    assert newest_state(replace(run, resume='never')) is None


def test_four_stages_leave_weights(shards, tmp_path):
    for stage in stages:
        run = short(stage, shards, tmp_path)
        if stage == 'text-to-image':
            cache_tokens(run)
        train(run)
        assert run.weights.exists() and not checkpoints(run)
    tokenizer = load_weights(ImageTokenizer(preset('tiny')), tmp_path / 'tokenizer.safetensors')
    assert (tokenizer.token_scale != 1).any()                    # measured
    sheets = {stage: [Image.open(path).size for path in (tmp_path / stage / 'samples').glob('*.png')] for stage in stages}
    assert {stage: len(sizes) for stage, sizes in sheets.items()} == {'tokenizer': 1, 'text': 0, 'text-to-image': 1, 'image-to-text': 0}
    (wide, high), (own_width, half) = sheets['tokenizer'][0], sheets['text-to-image'][0]
    assert wide == own_width == 8 * 128 + 7 * 4 and high == 2 * half + 4       # the originals above what is rebuilt
    told = [json.loads(line) for line in (tmp_path / 'image-to-text/log.jsonl').read_text().splitlines() if 'captions' in line]
    assert len(told[-1]['captions']) == len(told[-1]['prompts']) == 16
    assert from_json((tmp_path / 'config.json').read_text()) == preset('tiny')


def end_at(step, how):
    "A listener that ends the run when a step is logged."
    return lambda line: os.kill(os.getpid(), how) if line['step'] == step else None


@pytest.mark.parametrize('how', [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_at_once_and_goes_on(how, shards, tmp_path):
    run = replace(short('text', shards, tmp_path, steps=5), save_every=100)
    with pytest.raises(Stopped) as stopped:
        train(run, end_at(3, how))
    assert stopped.value.code == 128 + how and newest_state(run)['step'] == 3
    train(run)
    steps = [json.loads(line)['step'] for line in (run.folder / 'log.jsonl').read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5] and run.weights.exists() and not checkpoints(run)


def test_a_checkpoint_of_the_version_before_goes_on_to_the_same_weights(shards, tmp_path):
    "Average and optimisers by position, a recipe with the values of all stages, a config without rewrites."
    whole, parts = (short('text', shards, tmp_path / name, steps=5) for name in ('whole', 'parts'))
    train(whole)
    with pytest.raises(Stopped):
        train(parts, end_at(3, signal.SIGTERM))
    state, older, module = newest_state(parts), [], dict(TextAutoencoder(preset('tiny')).named_parameters())
    for optimizer, learner in zip(state['optimizers'], make_optimizers(TextAutoencoder(preset('tiny')), parts.recipe)):
        plain = learner.state_dict()
        shapes = [p.shape for group in learner.param_groups for p in group['params']]
        order = list(optimizer['state'])
        assert [module[name].shape for name in order] == shapes                  # by position: the same parameters
        older.append({'state': {i: optimizer['state'][name] for i, name in enumerate(order)},
                      'param_groups': [values | {'params': group['params']} for values, group in zip(optimizer['groups'], plain['param_groups'])]})
    identity = state['identity'] | {'recipe.gan_weight': 0., 'recipe.time_sampling': 'logit_normal'}
    identity = {name: value for name, value in identity.items() if name != 'config.text.rewrites'}
    _save_state(checkpoints(parts)[-1], **state | {'mean': list(state['mean'].values()), 'optimizers': older, 'identity': identity})
    train(parts)
    assert whole.weights.read_bytes() == parts.weights.read_bytes()
    old_run = json.loads(to_json(parts))
    old_run['recipe'] |= {'gan_weight': 0., 'time_sampling': 'logit_normal'}
    assert read_run(json.dumps(old_run)) == parts


def test_stages_go_on_to_the_same_weights(shards, tmp_path):
    for stage in stages:
        whole, parts = (short(stage, shards, tmp_path / name, steps=5) for name in ('whole', 'parts'))
        if stage == 'text-to-image':
            cache_tokens(whole), cache_tokens(parts)
        train(whole)
        with pytest.raises(Stopped):
            train(parts, end_at(3, signal.SIGTERM))
        train(parts)
        assert whole.weights.read_bytes() == parts.weights.read_bytes()


def start(run):
    (run.folder).mkdir(parents=True, exist_ok=True)
    (run.folder / 'run.json').write_text(to_json(run))
    return subprocess.Popen([sys.executable, '-m', 'flowtok.training.fit', str(run.folder / 'run.json')],
                            stdout=subprocess.DEVNULL, stderr=(run.folder / "errors.txt").open("w"), env=os.environ | {'OMP_NUM_THREADS': '1'})


def steps_logged(run):
    log = run.folder / 'log.jsonl'
    lines = [line for line in log.read_text().splitlines() if line.endswith('}')] if log.exists() else []
    return max((json.loads(line)['step'] for line in lines), default=0)


def kill_and_go_on(run, kills, seed=0):
    "Start a run again and again, each time killed at a random moment, and at last let it end."
    rng = random.Random(seed)
    for i in range(kills):
        process, target = start(run), min(run.recipe.steps - 2, (i + 1) * run.recipe.steps // (kills + 1))
        while process.poll() is None and steps_logged(run) < target:
            time.sleep(.01)
        time.sleep(rng.random() / 4)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(run).wait() == 0


@pytest.mark.parametrize('kills, steps', [(3, 40), pytest.param(10, 120, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_weights_are_the_same_to_the_bit(kills, steps, shards, tmp_path):
    whole, killed = (replace(short('text', shards, tmp_path / name, steps=steps), save_every=4, workers=2) for name in ('whole', 'killed'))
    assert start(whole).wait() == 0                              # as many threads as the killed one has
    kill_and_go_on(killed, kills)
    assert whole.weights.read_bytes() == killed.weights.read_bytes()
    lines = [json.loads(line) for line in (killed.folder / 'log.jsonl').read_text().splitlines()]
    assert sorted({line['step'] for line in lines}) == list(range(1, steps + 1))


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='asks Linux for its processes')
def test_a_killed_run_leaves_no_workers_behind(shards, tmp_path):
    def alive(run):
        "Processes whose command line names this run."
        found = []
        for path in os.listdir('/proc'):
            try:
                words = open(f'/proc/{path}/cmdline').read() if path.isdigit() else ''
            except OSError:
                continue
            found += [path] if str(run.folder / 'run.json') in words else []
        return found

    run = replace(short('text', shards, tmp_path, steps=500), workers=2)
    process = start(run)
    while process.poll() is None and steps_logged(run) < 3:
        time.sleep(.01)
    assert len(alive(run)) == 3
    process.kill()
    process.wait()
    deadline = time.time() + 20
    while alive(run) and time.time() < deadline:
        time.sleep(.1)
    assert not alive(run)


def without_key_biases(weights):
    """Weights by name, but for the biases of keys.

    Softmax does not change when all logits of a query grow by the same number: such a bias changes no output, its true gradient is zero,
    and an optimizer that normalises gradients follows their rounding."""
    kept = {}
    for name, x in weights.items():
        if name.endswith('qkv.bias'):
            kept |= {f'{name}, q': x.chunk(3)[0], f'{name}, v': x.chunk(3)[2]}
        elif not name.endswith('k.bias'):
            kept[name] = x.detach()
    return kept


def moved_and_apart(run, one, two):
    "The largest change of a weight by a run, and the largest difference of two runs."
    torch.manual_seed(run.seed)
    first, one, two = map(without_key_biases, (dict(engine.stage_classes[run.stage](run).trained.named_parameters()), one, two))
    return max((one[name] - x).abs().max().item() for name, x in first.items() if name in one), max((x - two[name]).abs().max().item() for name, x in one.items())


def test_two_processes_compute_what_one_does(shards, tmp_path):
    "Text to image, whose alignment loss and exchanged targets look at the whole batch."
    one, two = tmp_path / 'one', tmp_path / 'two'
    train(short('tokenizer', shards, one))
    two.mkdir()
    for name in ('tokenizer.safetensors', 'config.json'):
        (two / name).write_bytes((one / name).read_bytes())
    ends = []
    for processes, out in enumerate((one, two), 1):
        run = short('text-to-image', shards, out, steps=20, optimizer='adamw', precision='fp32', ema=0., learning_rate=1e-4,
                    indicator_probability=.5)
        cache_tokens(run)
        list(launch(run, processes))
        ends.append(load_file(run.weights))
    moved, apart = moved_and_apart(run, *ends)
    assert moved > 5e-4 and apart < 1e-6, (moved, apart)


def test_two_processes_follow_one_through_the_small_model_s_own_recipe(shards, tmp_path):
    "Muon, 30 steps."
    ends = []
    for processes in (1, 2):
        run = short('text', shards, tmp_path / str(processes), steps=30, warmup=5, ema=0., matrix_learning_rate=5e-3, batch_size=16)
        assert run.recipe.optimizer == 'muon'
        list(launch(run, processes))
        ends.append(load_file(run.weights))
    moved, apart = moved_and_apart(run, *ends)
    assert moved > .01 and apart < 1e-5, (moved, apart)


class Line(nn.Module):
    "A stage that fits a line, without randomness."
    def __init__(self, parts):
        super().__init__()
        torch.manual_seed(0)
        self.trained, self.weights = nn.Linear(3, 1), {'fit': 1.}
        self.run = plan('text', changes=f'accumulate={parts} optimizer=adamw precision=fp32 warmup=0')

    def forward(self, batch, rng): return {'fit': (self.trained(batch['x']) - batch['y']).square().mean(1)}


@pytest.mark.skipif(not (shutil.which('g++') or os.environ.get('CXX')), reason='no C++ compiler here')
def test_compiled_blocks_learn_the_same_within_a_memory_budget(shards, tmp_path):
    lines = {}
    for name, how in {'plain': {}, 'compiled': dict(compile=True, memory_budget=.5)}.items():
        run = replace(short('text', shards, tmp_path / name, steps=2, precision='fp32', optimizer='adamw'), **how)
        train(run, lambda line: lines.setdefault(name, []).append(line['loss']))
    assert lines['compiled'] == pytest.approx(lines['plain'], rel=1e-4) and len(lines['plain']) == 2


@pytest.mark.parametrize('how', [dict(compile=True, memory_budget=0.), dict(compile=True, memory_budget=1.5), dict(memory_budget=.5)])
def test_a_memory_budget_that_means_nothing_is_refused(how, shards, tmp_path):
    with pytest.raises(ValueError, match='memory_budget'):
        train(replace(short('text', shards, tmp_path), **how))


def test_parts_of_a_batch_add_up():
    x, y, ends = torch.randn(8, 3), torch.randn(8, 1), []
    for parts in (1, 2, 4):
        stage, accelerator = Line(parts), Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(stage, torch.optim.SGD(stage.trained.parameters(), .1))
        before = stage.trained.weight.detach().clone()
        next(training_steps(accelerator, model, stage, [optimizer], Ema(stage.trained, .9), iter([{'x': x, 'y': y}]), ShardedRng.of(accelerator)))
        ends.append(stage.trained.weight.detach())
        AcceleratorState._reset_state(reset_partial_state=False)
        assert (ends[-1] - before).abs().max() > 1e-3
    assert all(torch.allclose(end, ends[0], atol=1e-6) for end in ends)


def test_the_discriminator_learns_from_all_micro_batches(shards, tmp_path, monkeypatch):
    lines, judged, learn = {}, {}, stepping.Critics.learn
    for parts in (1, 2):
        def watched(self, accelerator, images, decoded, *rest):
            judged[parts] = images.sort(0).values
            assert len(images) == len(decoded)
            return learn(self, accelerator, images, decoded, *rest)
        monkeypatch.setattr(stepping.Critics, 'learn', watched)
        run = short('tokenizer', shards, tmp_path / str(parts), steps=1, batch_size=4, accumulate=parts, optimizer='adamw', gan_weight=.1,
                    gan_learning_rate=1e-3, lecam_weight=1e-2, text_drop=0.)
        train(run, lambda line: lines.update({parts: line}))
    assert len(judged[1]) == 4 and torch.equal(judged[1], judged[2])
    assert lines[1].keys() == lines[2].keys() >= {'discriminator', 'lecam', 'real_logit', 'fake_logit', 'adversarial', 'reconstruction', 'kl', 'loss'}
    for name in ('discriminator', 'real_logit', 'reconstruction', 'loss'):       # the noise of the tokens is not the same
        assert lines[2][name] == pytest.approx(lines[1][name], rel=.05, abs=2e-3), name


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
@pytest.mark.parametrize('every, told', [(1, [0, 0, 1, 2, 2, 2]), (6, [0, 1, 2])])
def test_a_step_without_finite_gradients_is_skipped_and_counted(every, told, optimizer, shards, tmp_path, monkeypatch):
    run, real, calls = short('text', shards, tmp_path, steps=6, optimizer=optimizer), stepping.total, []
    run = replace(run, log_every=every)

    def total(terms, weights):
        calls.append(1)
        return real(terms, weights) * (float('nan') if len(calls) in (3, 4) else 1.)

    monkeypatch.setattr(stepping, 'total', total)
    train(run)
    lines = [json.loads(line) for line in (run.folder / 'log.jsonl').read_text().splitlines()]
    assert [line.get('skipped', 0) for line in lines if 'seconds' in line] == told
    assert all(line['loss'] == line['loss'] for line in lines if 'loss' in line)
    assert all(x.isfinite().all() for x in load_file(run.weights).values())


class Waits(TorchDispatchMode):
    "Counts the operations whose answer the host needs, unless all that they look at was drawn on the host."
    asking = '_local_scalar_dense', 'nonzero', 'masked_select', 'equal', 'is_nonzero', 'unique', '_unique2'

    def __init__(self, host):
        super().__init__()
        self.host, self.drawn, self.found = host, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        seen = [x for x in args if isinstance(x, torch.Tensor)]
        from_host = getattr(kwargs.get('generator'), '_cdata', 0) == self.host._cdata or seen and all(any(x is y for y in self.drawn) for x in seen)
        mask = name.startswith('index') and any(x is not None and x.dtype == torch.bool for x in args[1] if not isinstance(x, int)) \
            if len(args) > 1 and isinstance(args[1], (list, tuple)) else False
        if (name in self.asking or mask) and not from_host:
            self.found.append(name)
        answer = func(*args, **kwargs)
        if from_host:
            self.drawn.append(answer)
        return answer


def test_what_counts_as_waiting():
    host = torch.Generator()
    with Waits(host) as waits:
        assert bool(torch.rand((), generator=host) < 2) and not waits.found
        bool(torch.ones(2).sum() > 1), torch.ones(2).nonzero(), torch.ones(2)[torch.ones(2) > 0]
    assert waits.found == ['_local_scalar_dense', 'nonzero', 'index']


@pytest.mark.parametrize('stage', stages)
def test_no_step_waits_for_the_device(stage, shards, tmp_path):
    for earlier in stages[:stages.index(stage)]:
        engine._prepare(short(earlier, shards, tmp_path, steps=1))
        train(short(earlier, shards, tmp_path, steps=1))
    critics = dict(gan_weight=.1, gan_learning_rate=1e-4) if stage == 'tokenizer' else {}
    run = short(stage, shards, tmp_path, optimizer='adamw', **critics)
    engine._prepare(run)
    accelerator, learner = engine._setup(run)
    optimizers = make_optimizers(learner.trained, run.recipe)
    model, *optimizers = accelerator.prepare(learner, *optimizers)
    critics, ema = Critics(run, accelerator, None) if critics else None, Ema(learner.trained, .9)
    assert critics is None or critics.of.active(0)
    batch = next(engine._Batches(run, learner, accelerator.device))
    rng = ShardedRng(torch.Generator(), host_generator=torch.Generator())
    steps = training_steps(accelerator, model, learner, optimizers, ema, iter(lambda: batch, None), rng, 0, critics)
    with Waits(rng.host_generator) as waits:
        for _ in range(2):
            _, terms = next(steps)
    AcceleratorState._reset_state(reset_partial_state=False)
    assert terms['loss'].isfinite() and not terms['broken'] and not waits.found


def test_a_broken_step_leaves_the_critics_alone(shards, tmp_path, monkeypatch):
    run, real, calls = short('tokenizer', shards, tmp_path, steps=5, gan_weight=.1, gan_learning_rate=1e-4), stepping.total, []

    def total(terms, weights):
        calls.append('adversarial' in terms)
        return real(terms, weights) * (float('nan') if calls.count(True) == 3 else 1.)

    monkeypatch.setattr(stepping, 'total', total)
    states = []
    monkeypatch.setattr(engine, 'save_checkpoint', lambda run, **state: states.append(copy.deepcopy(state['critics'])))
    train(replace(run, save_every=1))
    weights = [state['weights'] for state in states]
    same = [all(torch.equal(a[name], b[name]) for name in a if 'average' not in name) for a, b in zip(weights, weights[1:])]
    assert same == [False, True, False]
    assert all(x.isfinite().all() for state in weights for x in state.values())


def test_steps_that_all_fail_end_the_run_and_keep_the_checkpoint(shards, tmp_path, monkeypatch):
    run, real, calls = short('text', shards, tmp_path, steps=40), stepping.total, []

    def total(terms, weights):
        calls.append(1)
        return real(terms, weights) * (float('nan') if len(calls) > 4 else 1.)

    monkeypatch.setattr(stepping, 'total', total)
    with pytest.raises(FloatingPointError, match='10'):
        train(run)
    assert all(x.isfinite().all() for x in newest_state(run)['weights'].values())


def test_fine_tuning_starts_from_the_averages_of_a_training(shards, tmp_path):
    first = short('tokenizer', shards, tmp_path / 'first')
    train(first)
    second = replace(short('tokenizer', shards, tmp_path / 'second', steps=1, warmup=5), init=first.out)
    _, stage = engine._setup(second)
    AcceleratorState._reset_state(reset_partial_state=False)
    assert all(torch.equal(stage.trained.state_dict()[name], x) for name, x in load_file(first.weights).items())


@pytest.mark.parametrize('stage, name, factor', [('tokenizer', 'reconstruction', .8), ('text', 'caption', .8), ('text-to-image', 'flow', .95), ('image-to-text', 'flow', .9)])
def test_every_stage_learns(stage, name, factor, shards, tmp_path):
    "Forty steps of the real trainer: the mean loss of the last ten is below a stated share of that of the first ten."
    for earlier in {'text-to-image': ['tokenizer'], 'image-to-text': ['tokenizer', 'text']}.get(stage, []):
        train(short(earlier, shards, tmp_path, steps=2))
    run, losses = short(stage, shards, tmp_path, steps=40, batch_size=16), []
    engine._prepare(run)
    train(run, lambda line: losses.append(line[name]))
    assert len(losses) == 40 and sum(losses[-10:]) < factor * sum(losses[:10])


def test_recipes_can_be_changed_value_by_value():
    changes = parse_changes('learning_rate=1e-4, accumulate=4 gather=false')
    assert changes == dict(learning_rate=1e-4, accumulate=4, gather=False)
    assert plan('text-to-image', 'xl', changes=changes) == plan('text-to-image', 'xl', changes='learning_rate=1e-4, accumulate=4 gather=false')
    for wrong in ('lr=1', 'warmup=x', 'gather=maybe', 'betas=1', 'time_sampling=logit', 'time_std=0', 'p_start=2', 'ema=-1'):
        with pytest.raises(ValueError):
            plan('text', 'xl', changes=wrong)


def command(*words, cwd):
    return subprocess.run([sys.executable, '-m', 'flowtok.cli', 'train', *words], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {'OMP_NUM_THREADS': '1'})


def test_the_command_line_trains_and_tells(shards, tmp_path):
    done = command('--stage', 'text', '--data', shards, '--out', 'run', '--recipe.learning-rate', '1e-3', '--tensorboard', cwd=tmp_path)
    assert done.returncode == 0 and 'step 4 of 4' in done.stdout, done.stderr[-2000:]
    assert read_run((tmp_path / 'run/text/run.json').read_text()).recipe.learning_rate == 1e-3
    assert list((tmp_path / 'run/text').rglob('events.out.tfevents*'))
    done = command('--stage', 'text', '--data', shards, '--out', 'run', cwd=tmp_path)
    assert done.returncode == 0 and 'nothing to do' in done.stdout


@pytest.mark.parametrize('words, status', [
    (('--help',), 0), (('--scale', 'xxl'), 2), (('--recipe.warmup', 'soon'), 2), (('--recipe.lr', '1'), 2), (('--stage', 'text', '--data', 'nowhere'), 1),
    (('--recipe.time-sampling', 'logit'), 1)])
def test_bad_options_end_before_work_starts(words, status, tmp_path):
    done = command(*words, cwd=tmp_path)
    assert done.returncode == status and 'Traceback' not in done.stderr and not list(tmp_path.rglob('*.safetensors'))
    assert status or '--recipe.learning-rate' in done.stdout


def test_two_processes_of_the_command_line_share_the_token_cache(tmp_path):
    words = '--scale', 'smoke', '--steps', '1', '--batch-size', '8', '--samples', '1010'
    done = command(*words, '--processes', '2', '--out', 'run', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all((tmp_path / f'run/{stage}.safetensors').exists() for stage in stages)
    cache = json.loads((tmp_path / 'run/tokens/cache.json').read_text())
    assert cache['samples'] == 1010 and len(list((tmp_path / 'run/tokens').glob('*.tar'))) == 2
    words = '--stage', 'text-to-image', '--phase', 'fine-tuning', '--init', 'run', '--steps', '1', '--batch-size', '8'
    done = command(*words, '--data', 'run/tokens', '--out', 'tuned', cwd=tmp_path)             # tokens are data, too
    assert done.returncode == 0 and not (tmp_path / 'tuned/tokens').exists(), done.stderr[-2000:]
    assert FlowTokPipeline.from_pretrained(tmp_path / 'tuned').parts.keys() == {'tokenizer', 'text-to-image'}
    (tmp_path / 'run/tokens/cache.json').write_text(json.dumps(cache | {'tokenizer': 'another'}))
    done = command(*words, '--data', 'run/tokens', '--out', 'again', cwd=tmp_path)
    assert done.returncode == 1 and 'were made with another tokenizer' in done.stderr


def test_each_stage_reads_what_it_needs(tmp_path):
    paper, small = plan('tokenizer', 'xl', out=tmp_path), plan('tokenizer', 'tiny', out=tmp_path)
    assert paper.recipe.augment and not small.recipe.augment             # a flipped scene belies its caption
    assert engine.stage_classes['tokenizer'](replace(small, recipe=replace(small.recipe, augment=True))).reader.augment
    write(tmp_path / 'captions.tar', [{'txt': b'a red star'}] * 8)         # no images
    run = short('text', str(tmp_path / 'captions.tar'), tmp_path / 'run', steps=1)
    train(run)
    assert run.weights.exists()


def test_same_seed_same_weights(shards, tmp_path):
    runs = [short('text', shards, tmp_path / name) for name in 'ab']
    for run in runs:
        train(run)
    assert runs[0].weights.read_bytes() == runs[1].weights.read_bytes()


def test_seconds_of_all_stretches_count(tmp_path):
    log = tmp_path / 'log.jsonl'
    log.write_text(''.join(f'{line}\n' for line in ('{"seconds": 2}', '{"seconds": 5}', '{"captions": []}', '{"seconds": 1.5}')))
    assert training_seconds(log) == 6.5


def test_two_processes_train_and_refuse_an_odd_batch(shards, tmp_path):
    run = short('tokenizer', shards, tmp_path)
    assert list(launch(run, 2))[-1]['step'] == 3 and run.weights.exists()
    with pytest.raises(RuntimeError, match='2'):
        list(launch(replace(run, stage='text', recipe=replace(run.recipe, batch_size=7)), 2))


@pytest.mark.parametrize('processes', [1, 2])
def test_a_training_does_not_outlive_its_notebook(processes, shards, tmp_path):
    run = replace(short('text', shards, tmp_path, steps=100_000), save_every=100_000)
    run.folder.mkdir(parents=True)
    (run.folder / 'run.json').write_text(to_json(run))
    code = (f"from pathlib import Path; from flowtok.training.launch import launch; from flowtok.training.tasks import read_run; "
            f"list(launch(read_run(Path({str(run.folder / 'run.json')!r}).read_text()), {processes}))")
    notebook = subprocess.Popen([sys.executable, '-c', code], env=os.environ | {'OMP_NUM_THREADS': '1'})
    while steps_logged(run) < 3 and notebook.poll() is None:
        time.sleep(.1)
    notebook.kill()
    notebook.wait()
    for _ in range(300):
        if checkpoints(run):
            break
        time.sleep(.1)
    step = newest_state(run)['step']
    time.sleep(1)
    assert step >= 3 and steps_logged(run) <= step + 1 and not run.weights.exists()


def test_two_stages_side_by_side(shards, tmp_path):
    runs = short('tokenizer', shards, tmp_path), short('text', shards, tmp_path, steps=5)
    events = watch(*runs, processes=1)
    assert [lines[-1]['step'] for lines in events] == [3, 5] and all(run.weights.exists() for run in runs)


def test_two_processes_stop_and_go_on(shards, tmp_path):
    run = replace(short('text', shards, tmp_path, steps=30), save_every=3)
    for line in launch(run, 2):
        if line['step'] > 6:
            break                                                # terminates the processes, which save
    state = newest_state(run)
    muon, learned = state['optimizers'][0]['state'], TextAutoencoder(preset('tiny')).named_parameters()
    assert len(muon) == sum(p.ndim == 2 and ('blocks.' in name or 'layers.' in name) for name, p in learned) and all(isinstance(name, str) for name in muon)
    assert state['step'] % 3 or state['step'] > 6
    list(launch(run, 2))
    steps = [json.loads(line)['step'] for line in (run.folder / 'log.jsonl').read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 31)) and run.weights.exists()


def test_first_stage_missing_says_what_to_do(shards, tmp_path):
    with pytest.raises(FileNotFoundError):
        train(short('text-to-image', shards, tmp_path))


def test_missing_perceptual_weights_refuse(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    run = short('tokenizer', shards, tmp_path, perceptual_weight=1.1, convnext_share=.1)
    with pytest.raises(FileNotFoundError, match='vgg16-397923af.pth'):
        train(run)
    assert not run.weights.exists()


def test_the_tokenizer_has_critics_and_says_which_are_missing(shards, tmp_path, monkeypatch):
    "A discriminator from the third step on, no files of perceptual networks; stopped and resumed to the same weights."
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    real = stepping.TokenizerCritics
    monkeypatch.setattr(stepping, 'TokenizerCritics', lambda *words: real(*words, width=8, depth=2))
    critical = dict(steps=5, perceptual_weight=1.1, convnext_share=.1, gan_weight=.1, gan_start=2, gan_learning_rate=1e-3, lecam_weight=1e-3,
                    require_perceptual=False)
    whole, parts = (short('tokenizer', shards, tmp_path / name, **critical) for name in ('whole', 'parts'))
    train(whole)
    lines = [json.loads(line) for line in (whole.folder / 'log.jsonl').read_text().splitlines()]
    assert sum('missing' in line for line in lines) == 2 and 'vgg16-397923af.pth' in lines[0]['missing']
    assert ['discriminator' in line for line in lines if 'loss' in line] == [False, False, True, True, True]
    assert [line['adversarial'] == 0 for line in lines if 'loss' in line] == [True, True, False, False, False]
    with pytest.raises(Stopped):
        train(parts, end_at(4, signal.SIGTERM))
    train(parts)
    assert whole.weights.read_bytes() == parts.weights.read_bytes()
