"""The pipeline: seeds, batches, folders and the sentences of its errors."""
import functools
import http.server
import inspect
import itertools
import json
import shutil
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import flowtok.pipeline
from flowtok.config import preset
from flowtok.evaluation.metrics import psnr
from flowtok.flow.solver import Sampling
from flowtok.models.flowtok import direction_config
from flowtok.models.text import _tell_truncation
from flowtok.pipeline import _PARTS, FlowTokPipeline, embedded_weights
from flowtok.toy.shapes import captions, draw_scene, render
from flowtok.toy.verifier import is_true


@pytest.fixture(scope='module')
def pipe():
    return FlowTokPipeline.from_pretrained()


prompts = [captions(draw_scene(i, 'held_out'), i, 1, 'held_out')[0] for i in range(5)]


def test_embedded_weights_are_small_and_whole(pipe):
    assert sum(file.stat().st_size for file in embedded_weights().iterdir()) <= 10e6
    assert pipe.parts.keys() == {'tokenizer', 'text', 'text-to-image', 'image-to-text'}


def test_one_prompt_or_many_and_every_output_type(pipe):
    one = pipe(prompts[0], num_inference_steps=2)
    assert len(one) == 1 and one[0].size == (64, 64)
    images = pipe(prompts, num_inference_steps=2, output_type='pt')
    assert images.shape == (5, 3, 64, 64) and 0 <= images.min() and images.max() <= 1
    assert pipe(prompts, num_inference_steps=2, output_type='tokens').shape == (5, 16, 16)


def test_an_image_depends_on_its_own_generator_alone(pipe):
    def run(which, batch_size):
        generators = [torch.Generator().manual_seed(i) for i in which]
        return pipe([prompts[i] for i in which], 3, generator=generators, output_type='pt', batch_size=batch_size)
    together, apart = run(range(5), 5), torch.cat([run([i], 1) for i in range(5)])
    assert torch.allclose(together, apart, atol=1e-5)
    assert torch.equal(run(range(5), 2), run(range(5), 2))


def test_one_generator_serves_all_in_order(pipe):
    first, second = (pipe(prompts, 2, generator=torch.Generator().manual_seed(3), output_type='pt', batch_size=n) for n in (5, 2))
    assert torch.allclose(first, second, atol=1e-5)


def test_a_stream_is_the_call_batch_by_batch_and_reads_no_further(pipe):
    def seeds(n): return [torch.Generator().manual_seed(i) for i in range(n)]
    whole = pipe(prompts, 2, generator=seeds(5), output_type='pt', batch_size=2)
    parts = list(pipe.stream(prompts, 2, generator=seeds(5), output_type='pt', batch_size=2))
    assert [len(part) for part in parts] == [2, 2, 1] and torch.equal(torch.cat(parts), whole)
    read = []
    endless = (read.append(i) or prompts[i % 5] for i in itertools.count())
    stream = pipe.stream(endless, 1, batch_size=3)
    assert not read and len(next(stream)) == 3 and read == [0, 1, 2]
    assert [len(part) for part in pipe.stream('a red circle', 1)] == [1]


def test_equal_prompts_are_encoded_once(pipe, monkeypatch):
    encoded, forward = [], pipe.text_encoder.forward
    monkeypatch.setattr(pipe.text_encoder, 'forward', lambda ids: encoded.append(len(ids)) or forward(ids))
    many = [prompts[i % 2] for i in range(9)]
    def run(batch_size):
        return pipe(many, 2, generator=[torch.Generator().manual_seed(i) for i in range(9)], output_type='pt', batch_size=batch_size)
    together, parts = run(9), run(2)
    assert encoded == [2, 2] and torch.allclose(together, parts, atol=1e-5)
    assert not torch.allclose(together[0], together[2], atol=1e-3)               # same prompt, another seed


def test_solver_grid_and_interval_reach_both_directions(pipe):
    def run(**how): return pipe(prompts[:2], 4, 3., torch.Generator().manual_seed(0), 'tokens', **how)
    usual = run()
    assert torch.equal(usual, run(times=(0, .25, .5, .75, 1), guidance_interval=pipe.config.sampling.guidance_interval))
    for how in (dict(solver='heun'), dict(times=(0, .5, 1)), dict(guidance_interval=(0., .5))):
        assert not torch.allclose(usual, run(**how), atol=1e-4)
    image = Image.fromarray(render(draw_scene(0, 'seen')))
    assert pipe.caption(image, 4, solver='heun', times=(0, .5, 1), guidance_interval=(0., .5))


def test_the_schedule_of_the_config_is_followed_in_both_directions(monkeypatch):
    other = FlowTokPipeline.from_pretrained()
    other.config = replace(other.config, sampling=replace(other.config.sampling, schedule='released'))
    asked = []
    for part in (other.text_to_image, other.image_to_text):
        monkeypatch.setattr(part, 'generate', lambda x, how, *rest, made=part.generate, **more: asked.append(how.schedule) or made(x, how, *rest, **more))
    other(prompts[:1], 2), other.caption(torch.rand(1, 3, 64, 64), 2)
    assert asked == ['released'] * 2


def test_half_precision_is_close(pipe):
    half = FlowTokPipeline.from_pretrained().optimize('bf16')
    images = [p(prompts, 4, generator=torch.Generator().manual_seed(0), output_type='pt') for p in (pipe, half)]
    assert images[1].dtype == torch.float32 and 0 < (images[0] - images[1]).abs().mean() < .01
    assert half.text_to_image.dit.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert half.text_to_image.dit.blocks[0].modulation.weight.dtype == torch.float32
    assert len(half.caption(images[0], 1)) == 5


def test_compiled_batches_keep_their_size_and_are_announced(pipe, monkeypatch, capsys):
    "Without a compiler: what would be compiled is called with full batches alone, with guidance and after its interval."
    sizes = []
    monkeypatch.setattr(torch, 'compile', lambda f, **how: lambda dit, x, *rest: sizes.append((len(x), how)) or f(dit, x, *rest))
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **how: None)
    quick = FlowTokPipeline.from_pretrained().optimize(compile=True)
    images = [p(prompts, 2, generator=torch.Generator().manual_seed(0), output_type='pt', batch_size=3) for p in (pipe, quick)]
    assert torch.allclose(*images, atol=1e-5) and {n for n, _ in sizes} == {6, 3} and sizes[0][1]['dynamic'] is False
    assert len(capsys.readouterr().err.splitlines()) == 2                        # with guidance and without, once each
    quick(prompts, 2, batch_size=3)
    assert not capsys.readouterr().err


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_does_not_grow_with_the_number_of_images(pipe):
    def megabytes(): return int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6
    stream = pipe.stream(itertools.cycle(prompts), 1, output_type='pt', batch_size=16)
    used = [next(stream) is not None and megabytes() for _ in range(24)]
    assert used[-1] - used[8] < 20


def test_temperature_scales_what_the_draw_decides(pipe):
    def run(seed, temperature=None):
        return pipe(prompts, 2, generator=torch.Generator().manual_seed(seed), output_type='tokens', temperature=temperature)
    assert torch.equal(run(0, 0.), run(1, 0.))
    near, far = ((run(0, t) - run(1, t)).square().mean() for t in (.1, 1.))
    assert 0 < near < far and torch.equal(run(0), run(0, pipe.config.sampling.temperature))


def test_a_failed_save_leaves_the_old_config(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path, ())
    before = (tmp_path / 'config.json').read_bytes()
    changed = FlowTokPipeline(replace(pipe.config, sampling=replace(pipe.config.sampling, steps=7)))

    def write_half(self, text, **_):
        with self.open('w') as file:
            file.write(text[:len(text) // 2])
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('pathlib.Path.write_text', write_half)
    with pytest.raises(OSError):
        changed.save_pretrained(tmp_path, ())
    assert sorted(path.name for path in tmp_path.iterdir()) == ['README.md', 'config.json'] and (tmp_path / 'config.json').read_bytes() == before


def test_save_and_load_give_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = FlowTokPipeline.from_pretrained(tmp_path)
    draws = [p(prompts, 2, generator=torch.Generator().manual_seed(0), output_type='pt') for p in (pipe, again)]
    assert torch.equal(*draws)


def test_captions_take_any_image(pipe):
    image = Image.fromarray(render(draw_scene(0, 'seen')))
    same = pipe.caption([image, image.convert('RGBA'), image.resize((128, 128), Image.Resampling.NEAREST)], 4)
    assert len(same) == 3 and same[0] == same[1]
    assert len(pipe.caption([image.convert(mode) for mode in ('L', 'P', 'CMYK')] + [image.crop((0, 0, 50, 20))], 2)) == 4
    assert pipe.caption(image, 4) == same[:1]


@pytest.mark.parametrize('call', [
    lambda pipe: pipe([]), lambda pipe: pipe(['a red elephant']), lambda pipe: pipe(prompts, output_type='png'), lambda pipe: pipe(prompts, 0),
    lambda pipe: pipe(prompts, solver='best'), lambda pipe: pipe(prompts, batch_size=0), lambda pipe: pipe(prompts, num_images_per_prompt=0),
    lambda pipe: pipe(prompts, times=(0, 2)), lambda pipe: pipe(prompts, guidance_interval=(1, 0)), lambda pipe: pipe.optimize('fp64'),
    lambda pipe: pipe.optimize('int8'), lambda pipe: pipe(prompts, temperature=-1), lambda pipe: pipe(prompts, generator=[torch.Generator()]),
    lambda pipe: pipe.to(torch.float64), lambda pipe: pipe.caption([]), lambda pipe: pipe.caption(3), lambda pipe: pipe.caption(np.zeros((2, 3, 4, 5))),
    lambda pipe: pipe.caption(torch.rand(1, 3, 32, 32)), lambda pipe: pipe.caption(__file__)])
def test_bad_input_is_a_value_error_of_one_line(pipe, call):
    with pytest.raises(ValueError) as error:
        call(pipe)
    assert '\n' not in str(error.value)


def test_missing_folders_and_files_are_file_errors(pipe, tmp_path):
    for call in (lambda: FlowTokPipeline.from_pretrained(tmp_path), lambda: pipe.caption('nowhere.png')):
        with pytest.raises(FileNotFoundError):
            call()


def test_images_of_a_prompt_follow_each_other(pipe):
    def seeds(n): return [torch.Generator().manual_seed(i) for i in range(n)]
    several = pipe(prompts[:2], 2, generator=seeds(6), output_type='pt', num_images_per_prompt=3)
    assert torch.equal(several, pipe([prompts[0]] * 3 + [prompts[1]] * 3, 2, generator=seeds(6), output_type='pt'))
    parts = pipe.stream(iter(prompts[:2]), 2, generator=seeds(6), output_type='pt', num_images_per_prompt=3, batch_size=4)
    assert torch.allclose(torch.cat(list(parts)), several, atol=1e-5)


def test_the_call_has_a_signature_and_the_pipeline_a_repr_of_one_line(pipe):
    parameters = inspect.signature(pipe.__call__).parameters
    assert {'prompt', 'num_inference_steps', 'guidance_scale', 'generator', 'num_images_per_prompt', 'temperature'} <= parameters.keys()
    assert not [p for p in parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)] and FlowTokPipeline.__call__.__doc__
    assert len(repr(pipe).splitlines()) == 1 and 'float32' in repr(pipe) and repr(pipe) != repr(FlowTokPipeline(pipe.config))


def test_paths_addresses_and_arrays_are_captioned_alike(pipe, tmp_path):
    image = Image.fromarray(render(draw_scene(0, 'seen')))
    image.save(tmp_path / 'a.png')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        inputs = [image, tmp_path / 'a.png', str(tmp_path / 'a.png'), f'http://127.0.0.1:{server.server_port}/a.png', np.asarray(image),
                  np.asarray(image) / 255.]
        captions = pipe.caption(inputs)
        server.shutdown()
    assert set(captions) == {pipe.caption(image)[0]}


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_data_type_is_asked_for_as_in_diffusers(pipe, dtype):
    def run(p): return p(prompts, 4, generator=torch.Generator().manual_seed(0), output_type='pt')
    loaded, moved = FlowTokPipeline.from_pretrained(torch_dtype=dtype), FlowTokPipeline.from_pretrained().to('cpu', dtype)
    short = {torch.float16: FlowTokPipeline.half, torch.bfloat16: FlowTokPipeline.bfloat16}[dtype](FlowTokPipeline.from_pretrained())
    images = [run(p) for p in (loaded, moved, short)]
    assert loaded.dtype == dtype and images[0].dtype == torch.float32
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert (images[0] - run(pipe)).abs().mean() < .02 and (images[0] - run(pipe)).abs().max() > 0
    assert len(loaded.caption(images[0])) == len(prompts)
    outside = (loaded.text_encoder.positions, loaded.text_to_image.dit.embed.weight, loaded.text_to_image.dit.time.mlp[0].weight)
    assert all(weight.dtype == torch.float32 for weight in outside)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_the_default_data_type_changes_nothing(pipe, dtype):
    usual = pipe(prompts, 2, generator=torch.Generator().manual_seed(0), output_type='pt')
    torch.set_default_dtype(dtype)
    try:
        other = FlowTokPipeline.from_pretrained()
        images = other(prompts, 2, generator=torch.Generator().manual_seed(0), output_type='pt')
        told = other.caption(images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in other.parameters()} == {torch.float32} and torch.equal(images, usual) and told == pipe.caption(usual)


def test_a_device_without_float64_is_never_given_one(pipe):
    "Apple's MPS has no float64. The meta device stands for it here: whatever is made on it, or moved there, is looked at."
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                assert not (isinstance(x, torch.Tensor) and x.device.type == 'meta' and x.dtype == torch.float64), function
            return result
    with torch.device('meta'), Watch():
        other = FlowTokPipeline(pipe.config, **{stage.replace('-', '_'): _PARTS[stage](direction_config(pipe.config, stage)) for stage in _PARTS})
        x = torch.zeros(4, 16, 16)
        other.text_to_image.generate(x, Sampling(2))
        other.tokenizer.decode(other.tokenizer.encode(torch.zeros(4, 3, 64, 64)).mean)
    with Watch():
        with pytest.raises(NotImplementedError):                                 # copying out of meta: moved to the CPU before it is made double
            psnr(torch.zeros(2, 3, 8, 8, device='meta'), torch.zeros(2, 3, 8, 8, device='meta'))


def test_a_long_prompt_is_cut_and_said_once(pipe):
    _tell_truncation.cache_clear()
    with pytest.warns(UserWarning):
        pipe([' and '.join(['a red circle'] * 9)], 1)


def test_missing_and_wrong_weights(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, ['tokenizer', 'text'])
    part = FlowTokPipeline.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        part(prompts)
    (tmp_path / 'tokenizer.safetensors').write_bytes((tmp_path / 'text.safetensors').read_bytes())
    with pytest.raises(ValueError):
        FlowTokPipeline.from_pretrained(tmp_path)
    (tmp_path / 'tokenizer.safetensors').write_bytes(b'not a file of tensors')
    with pytest.raises(ValueError):
        FlowTokPipeline.from_pretrained(tmp_path)


def test_the_paper_size_runs_without_weights_only_with_a_sentence():
    with torch.device('meta'):
        pipe = FlowTokPipeline(preset('tiny'))
    with pytest.raises(RuntimeError):
        pipe(prompts)
    assert json.loads((embedded_weights() / 'config.json').read_text())['name'] == 'tiny'


def test_the_path_ends_in_the_image_and_starts_at_the_caption(pipe):
    seeded = lambda: torch.Generator().manual_seed(3)
    path = pipe.path(['a red star', 'a blue ring'], 4, generator=seeded(), output_type='pt')
    assert len(path) == 5 and all(images.shape == (2, 3, 64, 64) for images in path)
    assert torch.equal(path[-1], pipe(['a red star', 'a blue ring'], 4, generator=seeded(), output_type='pt'))
    tokens = pipe.path('a red star', 4, generator=seeded(), output_type='tokens', batch_size=1, temperature=0.)
    ids = pipe.text_encoder.tokenize('a red star')
    assert torch.allclose(tokens[0], pipe.text_to_image.source(pipe.text_encoder(ids)).mean, atol=1e-5)
    assert [image.size for image in pipe.path('a red star', 2)[0]] == [(64, 64)]
    for wrong in (dict(num_inference_steps=0), dict(output_type='jpg'), dict(solver='rk45')):
        with pytest.raises(ValueError):
            pipe.path('a red star', **wrong)


def test_a_saved_pipeline_has_a_model_card_and_a_persons_own_stays(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, ['tokenizer', 'text-to-image'])
    card = (tmp_path / 'README.md').read_text()
    assert card.startswith('---\nlibrary_name: flowtok') and 'pipeline_tag: text-to-image' in card
    assert all(f'| {stage} | {sum(p.numel() for p in pipe.parts[stage].parameters()):,} |' in card for stage in ('tokenizer', 'text-to-image'))
    (tmp_path / 'README.md').write_text('my own')
    pipe.save_pretrained(tmp_path, ['tokenizer', 'text-to-image'])
    assert (tmp_path / 'README.md').read_text() == 'my own'


def test_a_pipeline_is_pushed_with_its_files(pipe, tmp_path, monkeypatch):
    import huggingface_hub
    calls = {}

    class Api:
        def __init__(self, token=None): calls['token'] = token
        def create_repo(self, name, private=None, exist_ok=False): return calls.update(private=private, exist_ok=exist_ok) or SimpleNamespace(repo_id=name)
        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / 'hub')
            return f'https://hub/{repo_id}'
    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    assert pipe.push_to_hub('me/stars', private=True, token='x') == 'https://hub/me/stars'
    assert calls == {'token': 'x', 'private': True, 'exist_ok': True} and (tmp_path / 'hub' / 'README.md').exists()
    again = FlowTokPipeline.from_pretrained(tmp_path / 'hub')
    assert again.parts.keys() == pipe.parts.keys() and again.config == pipe.config


def test_the_way_back_tells_which_caption_an_image_has(pipe):
    scenes = [draw_scene(i, 'held_out') for i in range(24)]
    texts = [captions(scene, i, 1, 'held_out')[0] for i, scene in enumerate(scenes)]
    images = torch.from_numpy(np.stack([render(scene, 64) for scene in scenes])).permute(0, 3, 1, 2) / 255
    scores = pipe.match(images, texts)
    right = [is_true(texts[j], scene) for scene, j in zip(scenes, scores.argmax(1).tolist())]
    assert scores.shape == (24, 24) and scores.isfinite().all() and sum(right) >= 14       # by chance about one
    shuffled = pipe.match(images, texts[::-1]).flip(1)
    assert torch.allclose(shuffled, scores, atol=1e-4) and torch.allclose(pipe.match(images[:3], texts, batch_size=2), scores[:3], atol=1e-3)
    for wrong in (lambda: pipe.match(images, []), lambda: pipe.match(images, texts, 0), lambda: pipe.match(images, ['a xylophone'])):
        with pytest.raises(ValueError):
            wrong()
