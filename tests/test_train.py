"""The training engine: optimisers, averages, checkpoints, resuming, two processes."""
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from flowtok.config import from_json, preset, recipe, stages
from flowtok.model import load_weights
from flowtok.scenes import write_shards
from flowtok.text import TextAutoencoder
from flowtok.tokenizer import ImageTokenizer
from flowtok.train import (Ema, Log, Run, cache_tokens, launch, make_optimizers, rate_factor, save_state, train,
                           training_seconds, watch)


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shards')
    write_shards(folder, 'train', 64)
    return str(folder)


def short(stage, shards, out, steps=3, **recipe_values):
    quick = replace(recipe('tiny', stage), steps=steps, batch_size=8, warmup=1, **recipe_values)
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
    assert [round(rate_factor(s, r), 3) for s in (0, 5, 100)] == [0, round(.5 * rate_factor(5, replace(r, warmup=0)), 3), .1]


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


def test_failed_save_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / 'state.pt'
    save_state(path, step=1)
    with pytest.raises(OSError, match='The one before is as it was'):
        save_state(tmp_path / 'missing' / 'state.pt', step=2)
    assert torch.load(path, weights_only=True) == {'step': 1}


def test_four_stages_leave_weights(shards, tmp_path):
    for stage in stages:
        run = short(stage, shards, tmp_path)
        if stage == 'text-to-image':
            cache_tokens(run)
        train(run)
        assert run.weights.exists() and not (run.folder / 'state.pt').exists()
    tokenizer = load_weights(ImageTokenizer(preset('tiny')), tmp_path / 'tokenizer.safetensors')
    assert (tokenizer.token_scale != 1).any()                    # measured
    assert from_json((tmp_path / 'config.json').read_text()) == preset('tiny')


def test_resumed_run_goes_on_where_it_was(shards, tmp_path):
    run = short('text', shards, tmp_path, steps=4)
    class Stop(Exception):
        pass
    import flowtok.train as engine
    saved, engine.save_state = engine.save_state, lambda path, **state: (saved(path, **state), (_ for _ in ()).throw(Stop))[0]
    try:
        with pytest.raises(Stop):
            train(run)
    finally:
        engine.save_state = saved
    assert torch.load(run.folder / 'state.pt', weights_only=True)['step'] == 2
    train(run)
    steps = [json.loads(line)['step'] for line in (run.folder / 'log.jsonl').read_text().splitlines()]
    assert steps == [1, 2, 3, 4] and run.weights.exists()


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
    with pytest.raises(RuntimeError, match='cannot be shared by 2 processes'):
        list(launch(replace(run, stage='text', recipe=replace(run.recipe, batch_size=7)), 2))


def test_two_stages_side_by_side(shards, tmp_path):
    runs = short('tokenizer', shards, tmp_path), short('text', shards, tmp_path, steps=5)
    events = watch(*runs, processes=1)
    assert [lines[-1]['step'] for lines in events] == [3, 5] and all(run.weights.exists() for run in runs)


def test_two_processes_stop_and_go_on(shards, tmp_path):
    run = replace(short('text', shards, tmp_path, steps=30), save_every=3)
    for _ in launch(run, 2):
        if (run.folder / 'state.pt').exists():
            break
    state = torch.load(run.folder / 'state.pt', weights_only=True)
    muon, learned = state['optimizers'][0]['state'], TextAutoencoder(preset('tiny')).named_parameters()
    assert len(muon) == sum(p.ndim == 2 and ('blocks.' in name or 'layers.' in name) for name, p in learned)
    list(launch(run, 2))
    steps = [json.loads(line)['step'] for line in (run.folder / 'log.jsonl').read_text().splitlines()]
    assert steps == list(range(1, 31)) and run.weights.exists()


def test_first_stage_missing_says_what_to_do(shards, tmp_path):
    with pytest.raises(FileNotFoundError, match='train this stage first'):
        train(short('text-to-image', shards, tmp_path))
