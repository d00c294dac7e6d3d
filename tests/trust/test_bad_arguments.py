"Every public entry takes the numbers of other libraries, and answers all else with one ValueError before work starts."
import math
import os
from dataclasses import replace
from subprocess import CalledProcessError

import numpy as np
import pytest
import torch

from flowtok import cli
from flowtok.config import from_json
from flowtok.data.convert import _read_json, _read_rows
from flowtok.data.mixture import find_sources
from flowtok.lab.records import read_record
from flowtok.evaluation.features import Reference, fid_interval, _read_reference, reference_statistics
from flowtok.evaluation.metrics import frechet_distance, gaussian_statistics, tokenize_captions
from flowtok.flow.solver import sample
from flowtok.models.flowtok import save_weights
from flowtok.pipeline import FlowTokPipeline
from flowtok.training.tasks import plan


@pytest.fixture(scope='module')
def pipe():
    return FlowTokPipeline.from_pretrained()


NO_INTEGERS = None, True, 2.5, '3', [2], math.nan, np.array([1, 2]), 0, -1, 10**12, 1j
NO_NUMBERS = True, '2', [1.], math.nan, math.inf, 1e30, 1j, np.array([1., 2.])


@pytest.mark.parametrize('name, values', [
    ('num_inference_steps', NO_INTEGERS[1:]), ('batch_size', NO_INTEGERS[:9]), ('num_images_per_prompt', NO_INTEGERS[:9]),
    ('guidance_scale', NO_NUMBERS), ('temperature', NO_NUMBERS + (-.1, 2.1)),
    ('guidance_interval', (3, 'ab', (1, 0), (0, 2), (math.nan, 1), (0, 'x'), (0, .5, 1))), ('times', (3, 'ab', (0, math.nan, 1), (1, 0), ('0', '1'), [None])),
    ('generator', (42, 'x', [42], [], [None])), ('output_type', ('png', None, 3)), ('solver', ('best', None, 3))])
def test_a_bad_argument_of_the_pipeline_is_a_value_error(pipe, name, values):
    for value in values:
        with pytest.raises(ValueError):
            pipe('a blue star', **{name: value})


@pytest.mark.parametrize('prompt', [None, 3, 2.5, [], [3], ['a blue star', None], [['a blue star']], True, np.array(3), '', '!!!', '🙂', b'a blue star', object()])
def test_a_bad_prompt_is_a_value_error(pipe, prompt):
    with pytest.raises(ValueError):
        pipe(prompt)


@pytest.mark.parametrize('images', [
    torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 255 * torch.ones(1, 3, 64, 64), -torch.ones(1, 3, 64, 64), torch.full((1, 3, 64, 64), math.nan), torch.zeros(3, 64, 64),
    np.full((64, 64, 3), 255.), np.full((64, 64, 3), math.nan), np.full((64, 64), 300, dtype=np.int64), -np.ones((64, 64)), np.zeros(3), None, 3, [], [None], object()])
def test_bad_images_are_a_value_error(pipe, images):
    with pytest.raises(ValueError):
        pipe.caption(images)
    for name, values in (('batch_size', NO_INTEGERS[:9]), ('num_inference_steps', NO_INTEGERS[1:]), ('guidance_scale', NO_NUMBERS)):
        for value in values:
            with pytest.raises(ValueError):
                pipe.caption(np.zeros((64, 64, 3), dtype=np.uint8), **{name: value})


def test_numbers_of_other_libraries_are_as_good(pipe):
    def draw(*given, **named): return pipe('a blue star', *given, generator=torch.Generator().manual_seed(0), output_type='pt', **named)
    plain = draw(3, 2., batch_size=2, temperature=1.)
    for integer, number in ((np.int64, np.float32), (torch.tensor, torch.tensor), (np.array, np.array), (np.uint8, np.float64)):
        assert torch.equal(draw(integer(3), number(2.), batch_size=integer(2), temperature=number(1.)), plain)
    assert torch.equal(draw(3, 2), plain) and torch.equal(draw(times=np.linspace(0, 1, 4), guidance_scale=2), plain)


def test_a_solver_by_itself_has_the_same_guard():
    for how in ({'guidance_scale': math.nan}, {'guidance_scale': 'x'}, {'num_inference_steps': True}, {'guidance_interval': 3}):
        with pytest.raises(ValueError):
            sample(lambda x, t, indicator: x, torch.zeros(1, 2), **how)


@pytest.mark.parametrize('named, error', [
    (dict(longer=math.nan), ValueError), (dict(longer=-1.), ValueError), (dict(longer=math.inf), ValueError), (dict(steps=-1), ValueError), (dict(steps=2.5), ValueError),
    (dict(batch_size=True), ValueError), (dict(init='nowhere/at/all'), FileNotFoundError), (dict(clip='nowhere.pt'), FileNotFoundError)])
def test_a_bad_plan_is_refused_before_anything_is_made(tmp_path, named, error):
    with pytest.raises(error):
        plan('text', 'smoke', 'scenes', tmp_path / 'out', **named)
    assert not (tmp_path / 'out').exists()


def test_no_distance_comes_from_what_is_not_finite_or_not_symmetric():
    good = gaussian_statistics(np.random.default_rng(0).normal(size=(50, 4)))
    for place in range(2):
        for value in (math.nan, math.inf):
            bad = [array.copy() for array in good]
            bad[place].flat[0] = value
            for pair in ((*bad, *good), (*good, *bad)):
                with pytest.raises(ValueError):
                    frechet_distance(*pair)
            with pytest.raises(ValueError):
                fid_interval(np.random.default_rng(1).normal(size=(50, 4)), Reference(*bad, 50))
    skewed = good[1].copy()
    skewed[0, 1] += .5
    with pytest.raises(ValueError):
        frechet_distance(good[0], skewed, *good)


def test_kept_statistics_are_checked(tmp_path):
    from types import SimpleNamespace
    rows = np.random.default_rng(0).normal(size=(50, 4))
    extractor = SimpleNamespace(name='x', resize='y')
    made = reference_statistics(tmp_path, 'set', type('E', (), {'name': 'x', 'resize': 'y', '__call__': lambda self, images: rows})(), lambda: [None])
    file, = tmp_path.glob('*.npz')
    assert np.array_equal(reference_statistics(tmp_path, 'set', extractor, lambda: []).mean, made.mean)
    with pytest.raises(ValueError, match='JPEG'):
        reference_statistics(tmp_path, 'set', extractor, lambda: [], 'JPEG, whole')
    whole = file.read_bytes()
    for content in (whole[:300], b'', b'PK nothing'):
        file.write_bytes(content)
        with pytest.raises(ValueError):
            _read_reference(file)
    for change in (dict(mean=made.mean * math.nan), dict(cov=-made.cov), dict(n=0), dict(rows=rows * math.inf)):
        np.savez(file, **(dict(mean=made.mean, cov=made.cov, n=50, rows=rows) | change))
        with pytest.raises(ValueError):
            _read_reference(file)


def test_weights_that_overflow_in_the_file_are_not_written(tmp_path):
    layer = torch.nn.Linear(2, 2)
    layer.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError):
        save_weights(layer, tmp_path / 'w.safetensors', torch.float16)
    assert not list(tmp_path.iterdir())
    save_weights(layer, tmp_path / 'w.safetensors', torch.bfloat16)


@pytest.mark.parametrize('part, name, value', [
    ('tokenizer', 'rope_theta', 0.), ('tokenizer', 'num_tokens', -16), ('tokenizer', 'encoder_depth', 10**7), ('tokenizer', 'token_dim', 2**30), ('tokenizer', 'latent_scale', math.nan),
    ('text', 'length', 0), ('text', 'projector_dropout', math.inf), ('flow', 'depth', -1), ('flow', 'width', True), ('sampling', 'steps', 0), ('sampling', 'temperature', math.nan)])
def test_a_config_of_impossible_sizes_is_refused(part, name, value):
    from dataclasses import replace

    from flowtok.config import preset
    with pytest.raises(ValueError):
        replace(getattr(preset('xl'), part), **{name: value})


@pytest.mark.parametrize('name, value', [('save_every', 0), ('log_every', 0), ('sample_every', -1), ('keep', 0), ('seed', -1), ('workers', 2.5), ('resume', 'maybe')])
def test_a_run_of_impossible_numbers_is_refused(name, value):
    from dataclasses import replace
    with pytest.raises(ValueError):
        replace(plan('text'), **{name: value})


def test_a_recipe_that_is_not_finite_is_refused():
    from flowtok.config import parse_changes
    for name in ('learning_rate', 'kl_weight', 'clip', 'time_mean', 'ema'):
        for value in ('nan', 'inf'):
            with pytest.raises(ValueError):
                plan('text-to-image', changes=parse_changes(f'{name}={value}'))


@pytest.mark.parametrize('java', [False, True])
def test_captions_keep_their_lines_whatever_they_hold(java, monkeypatch):
    import shutil

    from flowtok.evaluation.metrics import tokenize_captions
    if java:
        pytest.importorskip('pycocoevalcap')
        if not shutil.which('java'):
            pytest.skip('no Java here')
    else:
        monkeypatch.setattr(shutil, 'which', lambda name: None)
    strange = ['a\nred\u2028ring', 'a\0blue\x85star', '', '   ', 'a\x0bgreen\x1dbar\r\n', 'a red ring']
    words, _ = tokenize_captions(strange)
    assert words == ['a red ring', 'a blue star', '', '', 'a green bar', 'a red ring']


def test_an_inception_that_is_another_file_is_never_unpickled(tmp_path):
    from flowtok.evaluation.features import load_inception
    torch.save({'a': 1}, tmp_path / 'weights.pth')
    with pytest.raises(ValueError):
        load_inception(tmp_path / 'weights.pth')


def test_guidance_needs_a_flow_that_trained_the_null_condition(pipe):
    unguided = FlowTokPipeline(replace(pipe.config, guided=('image-to-text',)), **{stage.replace('-', '_'): part for stage, part in pipe.parts.items()})
    how = dict(num_inference_steps=2, output_type='pt')
    for scale in (2., 0, 1.5):
        with pytest.raises(ValueError, match='guidance_scale'):
            unguided('a blue star', guidance_scale=scale, **how)
    a, b, c = (made('a blue star', generator=torch.Generator().manual_seed(0), **how, **given)
               for made, given in ((unguided, {}), (unguided, {'guidance_scale': 1}), (pipe, {'guidance_scale': 1})))
    assert torch.equal(a, b) and torch.equal(a, c)
    assert unguided.caption(b, guidance_scale=2.) == pipe.caption(b, guidance_scale=2.)
    assert plan('text-to-image', changes='indicator_probability=0').config.guided == ('image-to-text',)
    assert plan('text', changes='indicator_probability=0').config.guided == pipe.config.guided == plan('image-to-text').config.guided
    with pytest.raises(ValueError, match='text'):
        replace(pipe.config, guided=('text',))


def test_weights_of_clip_are_refused_where_there_is_no_clip():
    for clip in ('openai', 'nowhere.pt'):
        with pytest.raises(ValueError, match='clip.*words'):
            FlowTokPipeline.from_pretrained(clip=clip)


def test_json_that_is_nested_too_deeply_is_a_value_error(tmp_path):
    deep = '[' * 100_000
    for name in ('cache.json', 'result.json', 'rows.jsonl'):
        (tmp_path / name).write_text(deep)
    for read in (lambda: from_json(deep), lambda: find_sources(tmp_path / 'cache.json'), lambda: read_record(tmp_path), lambda: _read_json(tmp_path / 'cache.json'),
                 lambda: _read_rows(tmp_path / 'rows.jsonl')):
        with pytest.raises(ValueError):
            read()


@pytest.mark.parametrize('error', [RecursionError('too deep'), CalledProcessError(1, ['java'])])
def test_errors_of_programs_and_of_recursion_end_a_command_with_a_sentence(error, monkeypatch):
    def fail(self): raise error
    monkeypatch.setattr(cli._Tables, 'run', fail)
    with pytest.raises(SystemExit) as end:
        cli.main(['tables'])
    assert end.value.code not in (0, None)


def test_a_broken_java_is_named(tmp_path, monkeypatch):
    pytest.importorskip('pycocoevalcap')
    java = tmp_path / 'java'
    java.write_text('#!/bin/sh\necho no class >&2\nexit 3\n')
    java.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    with pytest.raises(OSError, match='3.*no class'):
        tokenize_captions(['a star'])
