"Peers: built small where their package is, refused with a cure where it is not, and timed by what an image costs."
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from flowtok.lab import external_baselines as peers
from flowtok.config import preset

own = [name for name, peer in peers.peers.items() if not peer.needs]


@pytest.mark.parametrize('name', list(peers.peers))
def test_small_editions_run(name):
    peer = peers.peers[name]
    if peer.needs and find_spec(peer.needs) is None:
        pytest.skip(f'needs {peer.needs}')
    timed = peers.build_peer(peer, small=True)
    learned = timed.learn(2)
    assert learned.isfinite() and not learned.requires_grad
    with torch.no_grad():
        assert timed.decode(2).shape == (2, 3, 256, 256) and len(timed.evaluate(3)) == 3
    assert timed.params < 5e6


def test_a_missing_package_is_a_sentence(monkeypatch):
    monkeypatch.setattr(peers, 'find_spec', lambda name: None)
    with pytest.raises(ModuleNotFoundError):
        peers.build_peer(peers.peers['SDXL'], small=True)
    assert own and all(peers.build_peer(peers.peers[name], small=True).params for name in own)


def test_an_image_costs_its_steps_and_one_decoding(monkeypatch):
    sizes = []

    def clock(work, b, repeats):
        sizes.append(b)
        return {'evaluate': .5, 'decode': 2.}[work]
    monkeypatch.setattr(peers, '_shortest', clock)
    timed = peers._Timed(0, 'evaluate', 'decode')
    assert peers.speed_of(timed, 20, 1., 6) == {'images/s': 6 / 12, 'evaluation (s)': .5, 'decoding (s)': 2.}
    assert peers.speed_of(timed, 20, 7.5, 6)['images/s'] == 6 / 12 and sizes == [6, 6, 12, 6]


def test_a_training_step_goes_back_and_leaves_nothing():
    network = torch.nn.Linear(2, 1)
    seen = []
    network.weight.register_hook(lambda grad: seen.append(1))
    learn = peers._learning(network, lambda b: network(torch.ones(b, 2)))
    found = peers.speed_of(peers._Timed(0, lambda b: network(torch.ones(b, 2)), lambda b: torch.ones(b), learn), 2, 1., 3, 1)
    assert found['training samples/s'] > 0 and len(seen) == 2 and network.weight.grad is None


def test_the_papers_sizes_are_the_presets():
    assert [peers.peers[f'FlowTok-{scale.upper()}'].size for scale in ('xl', 'h')] == [preset('xl'), preset('h')]


def test_the_pipeline_is_timed_from_prompt_to_image(monkeypatch):
    pipe = peers.random_pipeline(preset('tiny'))
    assert peers.ready(pipe, 'cpu') is pipe and {p.dtype for p in pipe.text_to_image.parameters()} == {torch.float32}
    shapes = []

    def clock(work, b, repeats):
        shapes.append(tuple(work(b).shape))
        return .5
    monkeypatch.setattr(peers, '_shortest', clock)
    assert peers.pipeline_speeds(pipe, ['a red star'] * 3, 2, (1., 2.)) == {1.: 6., 2.: 6.} and shapes == [(3, 3, 64, 64)] * 2
    peers.ready(pipe, 'cuda')                                                    # precision alone: nothing is moved
    assert torch.float16 in {p.dtype for p in pipe.text_to_image.parameters()}


def test_full_sizes_run_through_their_pipeline():
    small = peers._shrink(preset('xl'))
    pipe = peers.random_pipeline(replace(small, text=replace(small.text, width=preset('xl').text.width)))    # CLIP's tower has one width
    assert peers.pipeline_speeds(pipe, ['a red star'], 1, (2.,), 1)[2.] > 0
