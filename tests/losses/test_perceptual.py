"Critics: what their losses are, whom their gradients reach, and the files of weights that they wait for."
import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from flowtok.config import TokenizerRecipe
from flowtok.flow.source import DiagonalGaussian
from flowtok.losses.perceptual import (Adversary, Blur, ConvNeXtLogits, LPIPS, PatchDiscriminator, TokenizerCritics,
                             find_perceptual, _freeze, _perceptual_files, _read_weights)
from flowtok.losses.objective import (gan_factor, hinge_discriminator_loss, hinge_generator_loss,
                               lecam_loss, moving_average, perceptual_loss, tokenizer_terms, total)

def tokenizer_recipe(**changes): return TokenizerRecipe(9, 1, kl_weight=1e-6, gan_learning_rate=1e-4, **changes)


whole = tokenizer_recipe(perceptual_weight=1.1, convnext_share=0.1, gan_weight=0.1, gan_start=5, lecam_weight=1e-3)
channels = (64, 128, 256, 512, 512)


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def adversary():
    torch.manual_seed(0)
    return Adversary(width=8, depth=2)


def on_meta(name):
    "A network of torchvision's, without memory of its own; imported late, since a second process needs none."
    from torchvision import models
    with torch.device('meta'):
        return getattr(models, name)()


def random_state(net, generator):
    "Weights of the sizes of a network on the meta device, scaled so that features neither vanish nor explode."
    state = {}
    for name, x in net.state_dict().items():
        fan = math.prod(x.shape[1:])
        state[name] = torch.randn(x.shape, generator=generator) * (2 / fan)**.5 if x.ndim > 1 and fan > 1 else \
            torch.full(x.shape, 0.1)
    return state


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "The three files with random weights, in the format, under the names and with all the keys of the real ones."
    folder, generator = tmp_path_factory.mktemp('weights'), torch.Generator().manual_seed(0)
    vgg, convnext = on_meta('vgg16'), on_meta('convnext_small')
    state = random_state(vgg.features, generator)
    vgg = {name: state.get(name.removeprefix('features.'), torch.zeros(()).expand(x.shape))
           for name, x in vgg.state_dict().items()}
    lin = {f'lin{i}.model.1.weight': torch.rand(1, c, 1, 1, generator=generator) for i, c in enumerate(channels)}
    for name, content in (('vgg', vgg), ('lin', lin)):      # these two are older than today's format
        torch.save(content, folder / _perceptual_files[name][0], _use_new_zipfile_serialization=False)
    torch.save(random_state(convnext, generator), folder / _perceptual_files['convnext'][0])
    return folder


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    "No weights, no package lpips, and no way to download."
    def refuse(*args, **kwargs):
        raise AssertionError('something was downloaded')
    for name in ('load_state_dict_from_url', 'download_url_to_file'):
        monkeypatch.setattr(torch.hub, name, refuse)
    monkeypatch.setattr('flowtok.losses.perceptual.find_spec', lambda name: None)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    return tmp_path


# losses

def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2., 0.5, -1.]), torch.tensor([-2., 0., 3.])
    assert torch.isclose(hinge_discriminator_loss(real, fake), torch.tensor(((0 + .5 + 2) / 3 + (0 + 1 + 4) / 3) / 2))
    assert torch.isclose(hinge_generator_loss(fake), torch.tensor(-1 / 3))


def test_lecam_pulls_only_what_is_too_sure():
    real, fake = torch.tensor(2., requires_grad=True), torch.tensor(-3., requires_grad=True)
    loss = lecam_loss(real, fake, torch.tensor(1.), torch.tensor(-1.))
    loss.backward()
    assert (loss.item(), real.grad.item(), fake.grad.item()) == (25., 6., -8.)
    assert lecam_loss(torch.tensor(-2.), torch.tensor(3.), torch.tensor(1.), torch.tensor(-1.)) == 0


def test_average_start_and_shares():
    value = torch.tensor(4., requires_grad=True)
    average = moving_average(torch.tensor(2.), value, decay=0.75)
    assert average == 2.5 and not average.requires_grad
    assert [gan_factor(step, 3) for step in (2, 3, 4)] == [0., 1., 1.]
    assert torch.isclose(perceptual_loss({'convnext': torch.tensor(11.)}, 0.1), torch.tensor(1.))


# discriminator

@pytest.mark.parametrize('size', [(32, 32), (17, 30), (4, 4)])
def test_one_logit_for_each_patch_of_each_image(size):
    net, x = PatchDiscriminator(width=12, depth=2), torch.rand(3, 3, *size)
    logits = net(x)
    assert logits.shape == (3, 1, size[0] // 4, size[1] // 4)
    assert torch.allclose(net(x[1:2]), logits[1:2], atol=1e-5)      # the others in the batch do not matter
    with pytest.raises(ValueError, match='4'):
        net(x[..., :3])


def test_patches_are_local():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 128, 128, requires_grad=True)
    net = PatchDiscriminator(width=4, depth=2)
    net.layers = nn.Sequential(*[layer for layer in net.layers if not isinstance(layer, nn.GroupNorm)])
    net(x)[0, 0, 16, 16].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert 20 < rows.max() - rows.min() < 60 and rows.min() < 66 < rows.max()


def test_blur_keeps_the_mean_and_is_blind_to_single_pixel_stripes():
    flat = torch.full((1, 2, 8, 8), 3.)
    assert torch.allclose(Blur()(flat)[..., 1:-1, 1:-1], torch.tensor(3.))
    stripes = (torch.arange(8) % 2).float().expand(1, 1, 8, 8)
    assert torch.allclose(Blur()(stripes)[..., 1:-1, 1:-1], Blur()(1 - stripes)[..., 1:-1, 1:-1])


# who gets gradients

def test_each_side_trains_alone(adversary, images):
    decoded = (3 * images - 1).requires_grad_()                     # far outside of [0, 1], too
    adversary.generator_term(decoded).backward()
    assert (decoded.grad != 0).all() and all(p.grad is None for p in adversary.parameters())
    decoded.grad = None
    terms = adversary(images, decoded)
    total(terms, {'discriminator': 1., 'lecam': 0.001}).backward()
    assert decoded.grad is None and all((p.grad != 0).any() for p in adversary.parameters())


def test_terms_are_those_of_two_separate_calls(adversary, images):
    real, fake = (adversary.discriminator(x) for x in (images, 1 - images))
    adversary.real_average.fill_(0.3), adversary.fake_average.fill_(-0.2)
    wanted = lecam_loss(real.mean(), fake.mean(), torch.tensor(0.3), torch.tensor(-0.2))
    terms = adversary(images, 1 - images)
    assert torch.allclose(terms['discriminator'], hinge_discriminator_loss(real, fake), atol=1e-5)
    assert torch.allclose(terms['lecam'], wanted, atol=1e-5)
    assert torch.isclose(adversary.real_average, 0.999 * 0.3 + 0.001 * real.mean())
    assert torch.isclose(adversary.fake_average, 0.999 * -0.2 + 0.001 * fake.mean())


def test_critics_compute_in_single_precision(adversary, images):
    wanted = adversary.generator_term(images), adversary(images, 1 - images)['discriminator']
    with torch.autocast('cpu', torch.bfloat16):
        found = adversary.generator_term(images), adversary(images, 1 - images)['discriminator']
    assert torch.equal(torch.stack(wanted), torch.stack(found)) and found[0].dtype == torch.float32


def test_a_checkpoint_brings_the_memory_back(adversary, images):
    adversary(images, 1 - images)
    other = Adversary(width=8, depth=2)
    other.load_state_dict(adversary.state_dict())
    assert other.real_average == adversary.real_average != 0
    assert torch.equal(other(images, 1 - images)['lecam'], adversary(images, 1 - images)['lecam'])


def judge(batch):
    "Two steps of judging, after which it is known what the averages, LeCam's term and the gradients are."
    torch.manual_seed(0)
    adversary = Adversary(width=4, depth=1)
    adversary(*batch)
    terms = adversary(*batch)
    total(terms, {'discriminator': 1., 'lecam': 50.}).backward()
    return [adversary.real_average, terms['lecam'].detach()], [p.grad for p in adversary.parameters()]


def judge_half(rank, folder):
    "One of two processes, whose gradients are averaged as DistributedDataParallel does it."
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    numbers, gradients = judge(torch.load(folder / 'batch.pt')[:, 2 * rank:2 * rank + 2])
    for gradient in gradients:
        dist.all_reduce(gradient.div_(2))
    torch.save(numbers + gradients, folder / f'{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_judge_as_one(tmp_path):
    batch = torch.rand(2, 4, 3, 16, 16) * torch.tensor([1., 0.2, 3., 0.7]).view(4, 1, 1, 1)
    torch.save(batch, tmp_path / 'batch.pt')
    wanted = sum(judge(batch), [])
    mp.spawn(judge_half, (tmp_path,), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f'{rank}.pt')
        assert len(found) == len(wanted) and all(torch.allclose(*pair, atol=1e-5) for pair in zip(found, wanted))


# all critics

class Lightness(nn.Module):
    "A perceptual network that sees only how light an image is."
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.))

    def forward(self, decoded, images):
        return (self.scale * (decoded.mean() - images.mean())).square()


@pytest.mark.parametrize('objective, names, weights', [
    (tokenizer_recipe(), set(), (0., 0.)),
    (whole, {'lpips', 'convnext', 'perceptual', 'adversarial'}, (1.1, 0.1)),
    (tokenizer_recipe(perceptual_weight=1.), {'lpips', 'perceptual'}, (1., 0.)),
    (tokenizer_recipe(gan_weight=0.5), {'adversarial'}, (0., 0.5))])
def test_only_what_is_asked_for_is_computed(images, objective, names, weights):
    critics = TokenizerCritics(objective, {'lpips': Lightness(), 'convnext': Lightness()}, width=4, depth=1)
    terms = critics.generator_terms(images, images + 0.1, 9)
    assert set(terms) == names and tuple(critics.weights.values()) == weights
    total(terms | {'reconstruction': torch.zeros(())}, objective.weights | {'kl': 0.} | critics.weights)
    assert critics.active(9) == ('adversarial' in names)


def test_without_files_the_rest_goes_on(images):
    critics = TokenizerCritics(whole, {}, width=4, depth=1)
    terms = critics.generator_terms(images, images, 9)
    assert set(terms) == {'adversarial'} and critics.weights == {'perceptual': 0., 'adversarial': 0.1}
    half = TokenizerCritics(whole, {'lpips': Lightness()}, width=4, depth=1)
    terms = half.generator_terms(images, images + 0.5, 0)
    assert torch.isclose(half.weights['perceptual'] * terms['perceptual'], torch.tensor(1.))    # (2 x 0.5)^2


def test_the_discriminator_waits_for_its_step(images):
    critics, decoded = TokenizerCritics(whole, width=4, depth=1), images.clone().requires_grad_()
    assert [critics.active(step) for step in (0, 4, 5)] == [False, False, True]
    assert critics.generator_terms(images, decoded, 4)['adversarial'] == 0
    critics.generator_terms(images, decoded, 5)['adversarial'].backward()
    assert decoded.grad.abs().sum() > 0


def test_a_tokenizer_hands_out_what_it_drew(images):
    tokenizer = SimpleNamespace(encode=lambda x: DiagonalGaussian(x, torch.full_like(x, -200.)),
                                decode=lambda tokens, text_features: tokens + 2)
    terms = tokenizer_terms(tokenizer, images, recipe=whole, keep_decoded=True)
    assert torch.equal(terms['decoded'], images + 2) and 'decoded' not in tokenizer_terms(tokenizer, images)
    assert total(terms, whole.weights) == total(tokenizer_terms(tokenizer, images, recipe=whole), whole.weights)


@pytest.mark.parametrize('name', ['perceptual_weight', 'convnext_share', 'gan_weight', 'gan_start', 'lecam_weight'])
def test_negative_weights_are_refused(name):
    with pytest.raises(ValueError, match=f'{name}'):
        tokenizer_recipe(**{name: -1})


# perceptual networks

def test_frozen_networks_are_nobodys_parameters(images):
    net = LPIPS(nn.Sequential(*[nn.Conv2d(3, 3, 1), nn.Dropout()] * 15), [torch.ones(3)] * 5)
    critics = TokenizerCritics(whole, {'lpips': net}, width=4, depth=1)
    assert all(name.startswith('adversary') for name in (*critics.state_dict(), *dict(critics.named_parameters())))
    assert not critics.train().perceptual.lpips.network.training and critics.adversary.training
    critics.load_state_dict(TokenizerCritics(whole, width=4, depth=1).state_dict())
    assert critics.double().perceptual.lpips.network[0].weight.dtype == torch.float64


def test_lpips_is_the_formula(files, nowhere, images):
    found, sentences = find_perceptual(('lpips',), files)
    state = torch.load(files / _perceptual_files['vgg'][0])
    lin = torch.load(files / _perceptual_files['lin'][0])

    def features(x):
        "VGG16 written out: thirteen convolutions, and what comes out before each pooling."
        x, layer = x * 2 - 1, 0
        x = torch.stack([(x[:, 0] + .030) / .458, (x[:, 1] + .088) / .448, (x[:, 2] + .188) / .450], 1)
        for depth in (2, 2, 3, 3, 3):
            for _ in range(depth):
                weight, bias = state[f'features.{layer}.weight'], state[f'features.{layer}.bias']
                x, layer = F.conv2d(x, weight, bias, padding=1).clamp(min=0), layer + 2
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            x, layer = F.max_pool2d(x, 2), layer + 1

    other = (images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1)))
    wanted = sum(F.conv2d((a - b).square(), lin[f'lin{i}.model.1.weight']).mean((1, 2, 3))
                 for i, (a, b) in enumerate(zip(features(other), features(images))))
    assert not sentences and (wanted > 0.1).all()
    assert torch.allclose(found['lpips'](other, images), wanted.mean(), rtol=1e-4)
    assert torch.allclose(found['lpips'](other[:1], images[:1]), wanted[0], rtol=1e-4)


def test_lpips_gives_gradients_to_the_decoded_image_alone(files, nowhere, images):
    lpips = find_perceptual(('lpips',), files)[0]['lpips']
    decoded, originals = (1.5 * images).requires_grad_(), images.clone().requires_grad_()
    lpips(decoded, originals).backward()
    assert decoded.grad.isfinite().all() and (decoded.grad != 0).float().mean() > 0.99 and originals.grad is None
    assert lpips(images, images) == 0


def test_lpips_where_nothing_is_seen_has_a_gradient_that_is_a_number():
    blind = on_meta('vgg16').features[:30]
    blind.load_state_dict({name: torch.zeros(x.shape) for name, x in blind.state_dict().items()}, assign=True)
    decoded = torch.rand(1, 3, 32, 32, requires_grad=True)
    LPIPS(blind, [torch.ones(c) for c in channels])(decoded, torch.rand(1, 3, 32, 32)).backward()
    assert decoded.grad.isfinite().all()


def test_convnext_is_torchvisions_with_imagenets_pixels(files, nowhere, images):
    net = find_perceptual(('convnext',), files)[0]['convnext']
    net.size = 64
    ours = on_meta('convnext_small')
    ours.load_state_dict(torch.load(files / _perceptual_files['convnext'][0]), assign=True)

    def logits(x):
        x = F.interpolate(x, 64, mode='bilinear', antialias=True)
        return ours.eval()(torch.stack([(x[:, i] - m) / s for i, (m, s) in enumerate(
            ((.485, .229), (.456, .224), (.406, .225)))], 1))

    decoded = (1.2 * images).requires_grad_()
    found = net(decoded, images)
    assert torch.allclose(found, (logits(decoded) - logits(images)).square().mean(), rtol=1e-3) and found > 1e-6
    found.backward()
    assert decoded.grad.abs().sum() > 0 and net(images, images) == 0


def test_classifier_sees_224_pixels(images):
    seen = []
    net = ConvNeXtLogits(nn.Sequential(nn.Flatten(), nn.Identity()))
    net.network.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    net(images, images)
    assert seen == [(2, 3, 224, 224)] * 2


# files

def test_missing_files_are_told_in_one_sentence_each(nowhere):
    found, sentences = find_perceptual()
    hub = os.path.join(torch.hub.get_dir(), 'checkpoints')
    assert not found and len(sentences) == 2 and all(s.endswith(f'into the folder {hub}.') for s in sentences)
    for words in ('LPIPS', 'vgg16-397923af.pth (528 MB, from https://', 'lpips_vgg.pth (7 kB'):
        assert words in sentences[0]
    assert 'ConvNeXt-S: put convnext_small-0c510722.pth (192 MB' in sentences[1]


def test_names_are_torchvisions():
    from torchvision.models import ConvNeXt_Small_Weights, VGG16_Weights
    for name, weights in (('vgg', VGG16_Weights), ('convnext', ConvNeXt_Small_Weights)):
        file, size, source = _perceptual_files[name]
        assert source == weights.IMAGENET1K_V1.url and source.endswith('/' + file)
        assert size == f"{weights.IMAGENET1K_V1.meta['_file_size']:.0f} MB"


def test_package_and_then_the_hub_folder(files, nowhere, monkeypatch):
    checkpoints = nowhere / 'hub' / 'checkpoints'
    checkpoints.mkdir(parents=True)
    os.link(files / 'vgg16-397923af.pth', checkpoints / 'vgg16-397923af.pth')
    assert 'put lpips_vgg.pth' in find_perceptual(('lpips',))[1][0]
    weights = nowhere / 'lpips' / 'weights' / 'v0.1'
    weights.mkdir(parents=True)
    lin = {f'lin{i}.model.1.weight': torch.full((1, c, 1, 1), 7.) for i, c in enumerate(channels)}
    torch.save(lin, weights / 'vgg.pth')
    package = SimpleNamespace(submodule_search_locations=[str(nowhere / 'lpips')])
    monkeypatch.setattr('flowtok.losses.perceptual.find_spec', lambda name: package)
    assert (find_perceptual(('lpips',))[0]['lpips'].weight4 == 7).all()
    os.link(files / 'lpips_vgg.pth', checkpoints / 'lpips_vgg.pth')
    assert (find_perceptual(('lpips',))[0]['lpips'].weight4 < 1).all()


def test_missing_files_are_downloaded_once(files, nowhere, monkeypatch):
    "By torchvision's weights API, whose downloader checks the hash; LPIPS's own weights have no address."
    import torchvision
    (hub := nowhere / 'hub' / 'checkpoints').mkdir(parents=True)
    os.link(files / 'lpips_vgg.pth', hub / 'lpips_vgg.pth')
    requests = []
    def download(url, model_dir, check_hash, **options):
        requests.append((url.rpartition('/')[2], check_hash))
        os.link(files / requests[-1][0], os.path.join(model_dir, requests[-1][0]))
    monkeypatch.setattr(torchvision.models._api, 'load_state_dict_from_url', download)
    for answers in (False, True):
        monkeypatch.setattr('flowtok.losses.perceptual.reachable', lambda url: answers)
        networks, sentences = find_perceptual(download=True)
        assert len(networks) == 2 * answers and len(sentences) == 2 - 2 * answers
    assert find_perceptual(download=True)[0].keys() == networks.keys()
    assert sorted(requests) == [('convnext_small-0c510722.pth', True), ('vgg16-397923af.pth', True)]


def test_download_from_a_server_checks_the_hash(files, nowhere, monkeypatch):
    "torch.hub's own downloader, sent to a server on this machine: a file whose hash is another one is not kept."
    import hashlib
    import threading
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    import torchvision
    monkeypatch.undo()
    real = torch.hub.load_state_dict_from_url
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(nowhere / 'hub'))
    monkeypatch.setattr('flowtok.losses.perceptual.reachable', lambda url: True)
    served = nowhere / 'served'
    served.mkdir()
    name = _perceptual_files['convnext'][0]
    os.link(files / name, served / name)                                         # its name holds another hash
    digest = hashlib.sha256((files / name).read_bytes()).hexdigest()
    os.link(files / name, served / f'convnext_small-{digest[:8]}.pth')
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(SimpleHTTPRequestHandler, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}'
    try:
        monkeypatch.setattr(torchvision.models._api, 'load_state_dict_from_url', lambda url, **how: real(f'{address}/{name}', **how))
        with pytest.raises(FileNotFoundError):
            find_perceptual(('convnext',), download=True)
        assert not list((nowhere / 'hub' / 'checkpoints').glob('*'))

        def right(url, model_dir, **how):
            state = real(f'{address}/convnext_small-{digest[:8]}.pth', model_dir=model_dir, **how)
            os.rename(os.path.join(model_dir, f'convnext_small-{digest[:8]}.pth'), os.path.join(model_dir, name))
            return state
        monkeypatch.setattr(torchvision.models._api, 'load_state_dict_from_url', right)
        assert list(find_perceptual(('convnext',), download=True)[0]) == ['convnext']
    finally:
        server.shutdown()


def test_a_failed_download_is_one_sentence(nowhere, monkeypatch):
    import torchvision
    monkeypatch.setattr('flowtok.losses.perceptual.reachable', lambda url: True)
    for error in (OSError('no route'), RuntimeError('invalid hash value')):
        def download(*arguments, **options): raise error
        monkeypatch.setattr(torchvision.models._api, 'load_state_dict_from_url', download)
        with pytest.raises(FileNotFoundError, match='vgg16-397923af.pth'):
            find_perceptual(('lpips',), download=True)


def test_broken_files_are_named(nowhere):
    path, wanted = nowhere / 'x.pth', {'a': torch.empty(2, device='meta')}
    torch.save({'a': torch.ones(3)}, path)
    with pytest.raises(ValueError, match='2.*3'):
        _read_weights(path, wanted)
    with pytest.raises(ValueError, match=r'net\.a'):
        _read_weights(path, wanted, 'net.')
    for content in (path.read_bytes()[:200], b'', b'<html>not found</html>'):
        path.write_bytes(content)
        with pytest.raises(ValueError):
            _read_weights(path, wanted)


def test_freeze_keeps_the_function():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4, bias=False), nn.LayerNorm(4)), torch.rand(2, 3)
    wanted = net(x)
    assert torch.equal(_freeze(net)(x), wanted) and not list(net.parameters()) and not net.state_dict()
