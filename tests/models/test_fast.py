"Fast versions: what is kept, replaced or compiled gives the numbers of the plain models."
import copy

import pytest
import torch

from flowtok.config import preset
from flowtok.flow.solver import Sampling
from flowtok.models.fast import align_swiglu, _aligned_swiglu, cache_modulation, fuse_gelu, _linear_gelu
from flowtok.models.flowtok import DiT, FlowTok
from flowtok.models.layers import MLP, SwiGLU
from flowtok.pipeline import FlowTokPipeline

PRECISION = {torch.float16: 'fp16', torch.bfloat16: 'bf16'}


@pytest.fixture
def models():
    "A model, and a copy whose modulation is kept."
    torch.manual_seed(0)
    model = FlowTok(preset('tiny'))
    for p in model.dit.parameters():
        torch.nn.init.normal_(p, std=.05) if p.requires_grad else None
    fast = copy.deepcopy(model)
    cache_modulation(fast.dit)
    return model, fast


def test_modulations_are_computed_once_and_noticed_when_weights_change(models, monkeypatch):
    (model, fast), x, calls, real = models, torch.randn(2, 16, 16), [], DiT.modulations
    monkeypatch.setattr(DiT, 'modulations', lambda self, t, cond, s=None: calls.append(len(t)) or real(self, t, cond, s))
    for _ in range(3):
        fast.generate(x, Sampling(5))
    assert len(calls) == 5
    fast.generate(x, Sampling(6))
    assert len(calls) == 10                                                      # t = 0 is known

    def trained():
        fast.dit.indicator.weight.grad = torch.ones_like(fast.dit.indicator.weight)
        torch.optim.SGD(fast.dit.indicator.parameters(), .1).step()

    def loaded():
        fast.load_state_dict({name: p + .01 for name, p in fast.state_dict().items()})

    for change in (trained, loaded, lambda: fast.double().float(), lambda: torch.nn.init.ones_(fast.dit.final.modulation.bias)):
        change()
        model.load_state_dict(fast.state_dict())
        assert torch.allclose(fast.generate(x, Sampling(6)), model.generate(x, Sampling(6)), atol=1e-5)


def test_a_further_condition_is_never_kept(models, monkeypatch):
    "What the cache does not know by time and indicator is computed: an input of the velocity is not ignored after `optimize`."
    (_, fast), x, real = models, torch.randn(2, 16, 16), DiT.modulations

    def styled(self, t, cond, s=None):
        return [m + cond['style'][:, :1] if 'style' in cond else m for m in real(self, t, cond, s)]
    monkeypatch.setattr(DiT, 'modulations', styled)
    plain, styles = fast.generate(x, Sampling(3, 1.)), torch.tensor([[0.], [1.]])
    ends = [fast.generate(x, Sampling(3, 1.), {'style': style * torch.ones(2, 1)}) for style in styles]
    assert torch.allclose(ends[0], plain, atol=1e-6) and not torch.allclose(ends[1], plain, atol=1e-3) and len(fast.dit.kept[1]) == 3


def test_the_cache_stays_bounded_and_training_does_not_use_it(models):
    (model, fast), x = models, torch.randn(1, 16, 16)
    for n in (20, 300, 60):
        assert torch.allclose(fast.generate(x, Sampling(n, 1.)), model.generate(x, Sampling(n, 1.)), atol=1e-5) and len(fast.dit.kept[1]) <= 256
    kept = dict(fast.dit.kept[1])
    fast.velocity(x, .33).sum().backward()
    assert fast.dit.kept[1].keys() == kept.keys() and fast.dit.time.mlp[0].weight.grad is not None


def test_weights_made_in_inference_mode_are_never_mistaken():
    with torch.inference_mode():
        fast, x = FlowTok(preset('tiny')), torch.randn(1, 16, 16)
        torch.nn.init.normal_(fast.dit.final.linear.weight)
        cache_modulation(fast.dit)
        first = fast.generate(x)
        fast.dit.final.modulation.bias.add_(1.)
        assert not torch.allclose(fast.generate(x), first)


@pytest.mark.parametrize('kind', ['none', 'tanh'])
def test_linear_layer_and_gelu_in_one_pass(kind):
    layer = torch.nn.Linear(24, 40)
    for x in (torch.randn(3, 5, 24), torch.randn(24), torch.randn(5, 3, 24).transpose(0, 1), torch.randn(0, 24), torch.randn(1, 24).expand(6, 24)):
        usual = _linear_gelu(x, layer.weight, layer.bias, kind)
        with torch.no_grad():
            fused = _linear_gelu(x, layer.weight, layer.bias, kind)
        assert usual.requires_grad and not fused.requires_grad and torch.allclose(fused, usual, atol=1e-5)
    half = layer.bfloat16()
    assert _linear_gelu(torch.randn(2, 24).bfloat16(), half.weight, half.bias, kind).dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert _linear_gelu(torch.randn(2, 24), torch.randn(4, 24), torch.randn(4), kind).dtype == torch.bfloat16


@pytest.mark.parametrize('kind', ['none', 'tanh'])
def test_an_mlp_keeps_weights_and_values(kind):
    plain, x = torch.nn.Sequential(MLP(24, kind), torch.nn.Linear(24, 8)), torch.randn(3, 5, 24)
    fast = copy.deepcopy(plain)
    fuse_gelu(fast)
    with torch.no_grad():
        assert torch.allclose(fast(x), plain(x), atol=1e-5)
    assert fast.state_dict().keys() == plain.state_dict().keys() and type(fast[0]) is not MLP and type(plain[0]) is MLP


@pytest.mark.parametrize('width', [24, 32, 50])
def test_an_aligned_swiglu_keeps_weights_values_and_gradients(width):
    "Hidden widths of 64, which is left alone, 85 and 133."
    plain, x = torch.nn.Sequential(SwiGLU(width), torch.nn.Linear(width, 8)), torch.randn(3, 5, width)
    fast = copy.deepcopy(plain)
    align_swiglu(fast)
    plain(x).square().sum().backward()
    aligned = fast[1](_aligned_swiglu(fast[0], x))
    aligned.square().sum().backward()
    assert torch.allclose(aligned, plain(x), atol=1e-5) and torch.equal(fast(x), plain(x))      # on a CPU it stays plain
    for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert (type(fast[0]) is SwiGLU) == (width == 24) and type(plain[0]) is SwiGLU


def test_an_optimised_pipeline_gives_the_plain_images():
    plain, fast = FlowTokPipeline.from_pretrained(), FlowTokPipeline.from_pretrained().optimize()
    prompts = ['a blue star', 'a red ring top left', 'two green circles']
    images = [pipe(prompts, generator=torch.Generator().manual_seed(0), output_type='pt') for pipe in (plain, fast)]
    assert (images[0] - images[1]).abs().max() <= 1e-5 * images[0].abs().max() * 10 and not torch.equal(*images)
    tokens = [pipe(prompts, generator=torch.Generator().manual_seed(0), output_type='tokens') for pipe in (plain, fast)]
    assert (tokens[0] - tokens[1]).abs().max() <= 1e-5 * tokens[0].abs().max()
    assert plain.caption(images[0]) == fast.caption(images[0])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_data_type_may_change_after_images_were_made(dtype):
    "Modulations that were kept for float32 blocks are not used for others."
    def run(pipe): return pipe('a blue star', 4, generator=torch.Generator().manual_seed(0), output_type='pt')
    pipe = FlowTokPipeline.from_pretrained().optimize()
    first = run(pipe)
    assert torch.equal(run(pipe.to(dtype)), run(FlowTokPipeline.from_pretrained(torch_dtype=dtype).optimize(PRECISION[dtype])))
    assert torch.allclose(run(FlowTokPipeline.from_pretrained().optimize()), first)


def test_a_network_with_conditions_of_its_own_stays_itself_and_is_not_cached():
    class Toned(DiT):
        def condition(self, t, cond, s=None): return super().condition(t, cond, s) + cond['tone'][:, None]
    torch.manual_seed(0)
    flow = FlowTok(preset('tiny'))
    flow.dit = Toned(flow.config)
    for p in flow.dit.parameters():
        torch.nn.init.normal_(p, std=.05)
    x, tones = torch.randn(3, 16, 16), torch.tensor([0., 1., 2.])
    draw = lambda tones: flow.generate(x, Sampling(3, 2.), {'tone': tones})
    plain = draw(tones)
    for _ in range(2):                                                           # once more changes nothing
        cache_modulation(flow.dit)
        assert isinstance(flow.dit, Toned) and torch.allclose(draw(tones), plain, atol=1e-5)
    assert not torch.allclose(draw(tones.flip(0)), plain, atol=1e-2) and not flow.dit.kept[1]
