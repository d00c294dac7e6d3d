"""The pipeline: seeds, batches, folders and the sentences of its errors."""
import itertools
import json
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

import flowtok.pipeline
from flowtok.config import preset
from flowtok.pipeline import FlowTokPipeline, embedded_weights
from flowtok.data.shapes import captions, draw_scene, render


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


def test_a_picture_depends_on_its_own_generator_alone(pipe):
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
    for how in (dict(solver='ab2'), dict(times=(0, .5, 1)), dict(guidance_interval=(0., .5))):
        assert not torch.allclose(usual, run(**how), atol=1e-4)
    picture = Image.fromarray(render(draw_scene(0, 'seen')))
    assert pipe.caption(picture, 4, solver='ab2', times=(0, .5, 1), guidance_interval=(0., .5))


def test_the_schedule_of_the_config_is_followed_in_both_directions(monkeypatch):
    other = FlowTokPipeline.from_pretrained()
    other.config = replace(other.config, sampling=replace(other.config.sampling, schedule='released'))
    asked, made = [], flowtok.pipeline.sample
    monkeypatch.setattr(flowtok.pipeline, 'sample', lambda *a, **how: asked.append(how['schedule']) or made(*a, **how))
    other(prompts[:1], 2), other.caption(torch.rand(1, 3, 64, 64), 2)
    assert asked == ['released'] * 2


def test_half_precision_is_close(pipe):
    half = FlowTokPipeline.from_pretrained().optimize('bf16')
    images = [p(prompts, 4, generator=torch.Generator().manual_seed(0), output_type='pt') for p in (pipe, half)]
    assert images[1].dtype == torch.float32 and 0 < (images[0] - images[1]).abs().mean() < .01
    assert half.text_to_image.dit.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert half.text_to_image.dit.blocks[0].modulation.weight.dtype == torch.float32
    assert len(half.caption(images[0], 1)) == 5


def test_eight_bits_need_torchao_and_say_so(pipe, monkeypatch):
    try:
        import torchao.quantization  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="quantize 'int8' needs torchao: pip install torchao"):
            FlowTokPipeline.from_pretrained().optimize(quantize='int8')
        return
    images = [p(prompts, 4, generator=torch.Generator().manual_seed(0), output_type='pt')
              for p in (pipe, FlowTokPipeline.from_pretrained().optimize(quantize='int8'))]
    assert 0 < (images[0] - images[1]).abs().mean() < .01


def test_compiled_batches_keep_their_size_and_are_announced(pipe, monkeypatch, capsys):
    "Without a compiler: what would be compiled is called with full batches alone, with guidance and after its interval."
    sizes = []
    monkeypatch.setattr(torch, 'compile', lambda f, **how: lambda x, *rest: sizes.append((len(x), how)) or f(x, *rest))
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **how: None)
    quick = FlowTokPipeline.from_pretrained().optimize(compile=True)
    images = [p(prompts, 2, generator=torch.Generator().manual_seed(0), output_type='pt', batch_size=3) for p in (pipe, quick)]
    assert torch.allclose(*images, atol=1e-5) and {n for n, _ in sizes} == {6, 3} and sizes[0][1]['dynamic'] is False
    assert len(capsys.readouterr().err.splitlines()) == 2                        # with guidance and without, once each
    quick(prompts, 2, batch_size=3)
    assert not capsys.readouterr().err


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_does_not_grow_with_the_number_of_pictures(pipe):
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


def test_save_and_load_give_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = FlowTokPipeline.from_pretrained(tmp_path)
    draws = [p(prompts, 2, generator=torch.Generator().manual_seed(0), output_type='pt') for p in (pipe, again)]
    assert torch.equal(*draws)


def test_captions_take_any_picture(pipe):
    picture = Image.fromarray(render(draw_scene(0, 'seen')))
    same = pipe.caption([picture, picture.convert('RGBA'), picture.resize((128, 128), Image.Resampling.NEAREST)], 4)
    assert len(same) == 3 and same[0] == same[1]
    assert len(pipe.caption([picture.convert(mode) for mode in ('L', 'P', 'CMYK')] + [picture.crop((0, 0, 50, 20))], 2)) == 4
    assert pipe.caption(picture, 4) == same[:1]


def test_bad_input_gets_one_sentence(pipe, tmp_path):
    for call, words in (
            (lambda: pipe([]), 'list of prompts is empty'),
            (lambda: pipe(['a red elephant']), 'elephant'),
            (lambda: pipe(prompts, output_type='png'), 'choose one of pil, pt, tokens'),
            (lambda: pipe(prompts, 0), '0'),
            (lambda: pipe(prompts, solver='best'), 'euler'),
            (lambda: pipe(prompts, batch_size=0), 'batch_size must be a whole number of at least 1, got 0'),
            (lambda: pipe(prompts, times=(0, 2)), 'times must rise from 0 to 1'),
            (lambda: pipe(prompts, guidance_interval=(1, 0)), 'guidance_interval must be two rising times'),
            (lambda: pipe.optimize('fp64'), "precision 'fp64' is unknown: choose one of fp32, bf16, fp16."),
            (lambda: pipe.optimize(quantize='int3'), "quantize 'int3' is unknown: choose one of int8, float8."),
            (lambda: pipe(prompts, temperature=-1), 'temperature must be between 0'),
            (lambda: pipe(prompts, generator=[torch.Generator()]), '5 pictures need 5 generators'),
            (lambda: pipe.caption([]), 'an empty list'),
            (lambda: pipe.caption(['a.png']), 'got str'),
            (lambda: pipe.caption(torch.rand(1, 3, 32, 32)), r'\(b, 3, 64, 64\)')):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(FileNotFoundError, match='no config.json'):
        FlowTokPipeline.from_pretrained(tmp_path)


def test_a_long_prompt_is_cut_and_said_once(pipe):
    with pytest.warns(UserWarning):
        pipe([' and '.join(['a red circle'] * 9)], 1)


def test_missing_and_wrong_weights(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, ['tokenizer', 'text'])
    part = FlowTokPipeline.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match='no weights for text-to-image: it has tokenizer, text'):
        part(prompts)
    (tmp_path / 'tokenizer.safetensors').write_bytes((tmp_path / 'text.safetensors').read_bytes())
    with pytest.raises(ValueError, match='does not fit this ImageTokenizer'):
        FlowTokPipeline.from_pretrained(tmp_path)
    (tmp_path / 'tokenizer.safetensors').write_bytes(b'not a file of tensors')
    with pytest.raises(ValueError, match='not a whole safetensors file'):
        FlowTokPipeline.from_pretrained(tmp_path)


def test_the_paper_size_runs_without_weights_only_with_a_sentence():
    with torch.device('meta'):
        pipe = FlowTokPipeline(preset('tiny'))
    with pytest.raises(RuntimeError, match='it has none'):
        pipe(prompts)
    assert json.loads((embedded_weights() / 'config.json').read_text())['name'] == 'tiny'
