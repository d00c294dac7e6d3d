"A run goes on only as the run that it was: what differs is named, nothing is lost."
import json
import shutil
from dataclasses import replace

import pytest
import torch

from flowtok.config import preset, to_json
from flowtok.data.images import read_samples
from flowtok.data.mixture import find_sources
from flowtok.toy.shapes import write_shards
from flowtok.data.token_cache import write_token_cache
from flowtok.files import file_digest
from flowtok.training.checkpointing import Stopped, checkpoints, merge_config, newest_state, run_identity, save_checkpoint
from flowtok.training.fit import train
from flowtok.training.tasks import plan


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    "A run of the text stage that was stopped after six of twelve steps."
    folder = tmp_path_factory.mktemp('run')
    write_shards(folder / 'scenes', 'train', 64)
    run = replace(plan('text', 'smoke', folder / 'scenes', folder / 'out', steps=12), save_every=3)

    def stop(line):
        if line['step'] >= 6:
            import os
            import signal
            os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        train(replace(run, log_every=1), stop)
    assert newest_state(run)['step'] >= 6
    return run


@pytest.fixture
def again(stopped, tmp_path):
    "The same in a folder of its own."
    shutil.copytree(stopped.out, tmp_path / 'out')
    shutil.copytree(stopped.data, tmp_path / 'scenes')
    return replace(stopped, out=str(tmp_path / 'out'), data=str(tmp_path / 'scenes'))


def lines(run):
    return [json.loads(line) for line in (run.folder / 'log.jsonl').read_text().splitlines()]


def recipe(**values): return lambda run: replace(run, recipe=replace(run.recipe, **values))


@pytest.mark.parametrize('field, change', [
    ('seed', lambda run: replace(run, seed=1)), ('kl_weight', recipe(kl_weight=.5)), ('steps', recipe(steps=24)), ('learning_rate', recipe(learning_rate=1e-5)),
    ('batch_size', recipe(batch_size=32)), ('schedule', recipe(schedule='constant')), ('ema', recipe(ema=.5)), ('data', None),
    ('vocabulary', lambda run: replace(run, config=replace(run.config, text=replace(run.config.text, vocabulary=run.config.text.vocabulary[::-1]))))])
def test_another_run_is_refused_with_what_differs_and_nothing_is_touched(again, field, change):
    if field == 'data':                                                          # the same names and number, other images and captions
        write_shards(again.data + '2', 'train', 64, anywhere=1.)
        shutil.rmtree(again.data)
        shutil.move(again.data + '2', again.data)
    other = change(again) if change else again
    before = {path: path.read_bytes() for path in again.folder.rglob('*') if path.is_file()}
    with pytest.raises(ValueError) as refused:
        train(other)
    assert field in str(refused.value)
    for path, content in before.items():
        assert path.name == '.lock' or path.read_bytes() == content


def test_the_same_run_goes_on_wherever_it_lies_and_however_often_it_logs(again):
    train(replace(again, log_every=5, keep=7, workers=0, save_every=4))
    assert again.weights.exists() and lines(again)[-1]['step'] == 12


def test_a_change_that_is_asked_for_is_done_and_recorded(again):
    train(replace(recipe(learning_rate=1e-5)(again), resume='changed'))
    changed = [line['changed'] for line in lines(again) if 'changed' in line]
    assert len(changed) == 1 and 'learning_rate' in changed[0] and again.weights.exists()


def test_to_begin_anew_loses_nothing_of_the_earlier_run(again):
    old = {path.name: path.read_bytes() for path in checkpoints(again)}
    train(replace(again, resume='never', seed=5))
    aside, = again.folder.glob('checkpoints-before-*')
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == old and list(again.folder.glob('log.jsonl-before-*'))
    assert again.weights.exists()


def test_new_checkpoints_are_never_pruned_for_later_ones_that_cannot_be_read(again):
    for path in checkpoints(again):
        path.write_bytes(b'broken')
    (again.folder / 'checkpoints' / '99999999.pt').write_bytes(b'broken')
    save_checkpoint(replace(again, keep=1), step=1)
    assert newest_state(again)['step'] == 1


def test_a_checkpoint_of_before_there_were_identities_is_taken(again):
    for path in checkpoints(again):
        state = torch.load(path, weights_only=True)
        del state['identity']
        torch.save(state, path)
    train(again)
    assert again.weights.exists()


def test_weights_of_earlier_stages_belong_to_a_flow(tmp_path):
    write_shards(tmp_path / 'scenes', 'train', 64)
    run = plan('text-to-image', 'smoke', tmp_path / 'scenes', tmp_path / 'out')
    tokenizer = plan('tokenizer', 'smoke', tmp_path / 'scenes', tmp_path / 'out', steps=2)
    train(tokenizer)
    first = run_identity(run)
    tokenizer.weights.unlink()
    train(replace(tokenizer, seed=1))
    assert {name for name, value in run_identity(run).items() if value != first[name]} == {'weights of tokenizer'}


def test_a_token_cache_knows_images_and_captions_by_content(tmp_path):
    size = preset('tiny').tokenizer.image_size

    def encode(data):
        return write_token_cache(find_sources(data), lambda pixels: torch.zeros(len(pixels), 16, 32).numpy(), tmp_path / 'tokens', size, tokenizer='x')
    shard, = write_shards(tmp_path / 'scenes', 'train', 8)
    encode(tmp_path / 'scenes')
    encode(tmp_path / 'scenes')
    content = bytearray(shard.read_bytes())
    captions = [sample['txt'] for sample in read_samples([str(shard)], {})]
    place = content.index(captions[3])
    content[place:place + 1] = b'A'                                              # a letter of one caption, as long as before
    shard.write_bytes(content)
    with pytest.raises(ValueError):
        encode(tmp_path / 'scenes')


def test_a_large_file_is_known_by_its_parts(tmp_path):
    path = tmp_path / 'large'
    path.write_bytes(bytes(2**20))
    known = file_digest(path, whole=2**10, block=2**8)
    for place in (0, 2**20 - 1):
        with open(path, 'r+b') as file:
            file.seek(place)
            file.write(b'x')
        changed = file_digest(path, whole=2**10, block=2**8)
        assert changed != known
        known = changed
    with open(path, 'ab') as file:
        file.write(b'x')
    assert file_digest(path, whole=2**10, block=2**8) != known


def test_weights_of_one_direction_are_not_those_of_the_other(tmp_path):
    from flowtok.models.flowtok import FlowTok, load_weights, save_weights
    config = preset('tiny')
    save_weights(FlowTok(config), tmp_path / 'text-to-image.safetensors', stage='text-to-image')
    load_weights(FlowTok(config), tmp_path / 'text-to-image.safetensors', 'text-to-image')
    shutil.copy(tmp_path / 'text-to-image.safetensors', tmp_path / 'image-to-text.safetensors')
    with pytest.raises(ValueError):
        load_weights(FlowTok(config), tmp_path / 'image-to-text.safetensors', 'image-to-text')


def test_another_scale_is_not_trained_into_a_folder_with_weights(again):
    train(again)
    config, weights = (again.folder.parent / 'config.json').read_bytes(), again.weights.read_bytes()
    other = plan('tokenizer', 'smoke', again.data, again.out, steps=2)
    other = replace(other, config=replace(other.config, tokenizer=replace(other.config.tokenizer, token_dim=8)))
    with pytest.raises(ValueError):
        train(other)
    assert (again.folder.parent / 'config.json').read_bytes() == config and again.weights.read_bytes() == weights


def test_a_later_stage_leaves_what_the_flow_s_training_wrote_into_the_config(tmp_path):
    "The source and the null condition belong to the run of their flow, whatever the recipe of a later stage says."
    first = plan('text-to-image', out=str(tmp_path), changes='source=kl source_std=0 mean_scale=0 indicator_probability=0')
    first.weights.write_bytes(b'')
    (tmp_path / 'config.json').write_text(to_json(merge_config(first)))
    later = merge_config(plan('image-to-text', out=str(tmp_path)))
    assert later.source.kind == 'kl' and later.guided == ('image-to-text',)
    again = merge_config(plan('text-to-image', out=str(tmp_path)))
    assert again.source.kind == 'fixed' and again.guided == ('text-to-image', 'image-to-text')


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    from flowtok.pipeline import FlowTokPipeline
    from safetensors.torch import load_file, save_file
    FlowTokPipeline.from_pretrained().save_pretrained(tmp_path)
    for value in (float('nan'), float('inf')):
        state = load_file(tmp_path / 'text.safetensors')
        next(iter(state.values())).view(-1)[0] = value
        save_file(state, tmp_path / 'text.safetensors')
        with pytest.raises(ValueError):
            FlowTokPipeline.from_pretrained(tmp_path)
