"What needs a GPU: python -m pytest -q -m cuda"
import copy

import pytest
import torch

from flowtok.toy.shapes import write_shards
from flowtok.models.fast import align_swiglu, fuse_gelu
from flowtok.models.layers import MLP, SwiGLU
from flowtok.pipeline import FlowTokPipeline
from flowtok.training.fit import _prepare, train
from flowtok.training.tasks import plan

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')]
prompts = ['a blue star', 'a red ring top left', 'two green circles', 'a yellow cross and a purple bar']


def images_of(pipe):
    return pipe(prompts, generator=torch.Generator().manual_seed(0), output_type='pt').cpu()


@pytest.fixture(scope='module')
def on_cpu():
    return images_of(FlowTokPipeline.from_pretrained())


def test_a_gpu_draws_what_a_cpu_draws(on_cpu):
    pipe = FlowTokPipeline.from_pretrained().to('cuda')
    assert pipe.device.type == 'cuda' and (images_of(pipe) - on_cpu).abs().mean() < 1e-3
    assert pipe.caption(on_cpu) == FlowTokPipeline.from_pretrained().caption(on_cpu)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_on_a_gpu(dtype, on_cpu):
    pipe = FlowTokPipeline.from_pretrained().to('cuda', dtype)
    assert pipe.dtype == dtype and (images_of(pipe) - on_cpu).abs().mean() < .03
    assert len(pipe.caption(on_cpu)) == len(prompts)


@pytest.mark.parametrize('how', [{}, {'precision': 'fp16'}, {'compile': True}])
def test_optimised_on_a_gpu(how, on_cpu):
    pipe = FlowTokPipeline.from_pretrained().to('cuda').optimize(**how)
    assert (images_of(pipe) - on_cpu).abs().mean() < (.03 if how.get('precision') else 1e-3)


@pytest.mark.parametrize('dtype, bound', [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_fused_layers_on_a_gpu(dtype, bound):
    for width, plain in ((96, MLP(96, 'tanh')), (96, MLP(96)), (1024, SwiGLU(1024))):
        plain.to('cuda', dtype)
        fast, x = copy.deepcopy(plain), torch.randn(7, 5, width, device='cuda', dtype=dtype)
        fuse_gelu(fast), align_swiglu(fast)
        with torch.no_grad():
            assert type(fast) is not type(plain) and (fast(x) - plain(x)).norm() < bound * plain(x).norm()


def test_a_generator_may_live_on_the_gpu():
    pipe = FlowTokPipeline.from_pretrained().to('cuda')
    draws = [pipe(prompts, 2, generator=torch.Generator('cuda').manual_seed(3), output_type='pt') for _ in range(2)]
    assert torch.equal(*draws) and draws[0].device.type == 'cuda'


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_every_stage_trains_on_a_gpu(precision, tmp_path):
    write_shards(tmp_path / 'shards', 'train', 64)
    for stage in ('tokenizer', 'text', 'text-to-image', 'image-to-text'):
        run, lines = plan(stage, 'smoke', tmp_path / 'shards', tmp_path / 'out', changes=f'precision={precision}'), []
        _prepare(run)
        train(run, lines.append)
        assert run.weights.exists() and all(line['loss'] < 1e4 for line in lines)
    assert FlowTokPipeline.from_pretrained(tmp_path / 'out').to('cuda')('a blue star', 2)[0].size == (64, 64)
