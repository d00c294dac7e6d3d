"One pipeline, many threads; loading changes nothing outside and depends on nothing outside."
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flowtok.pipeline import FlowTokPipeline

PROMPTS = ['a blue star', 'a red ring top left', 'two green circles', 'a yellow cross and a purple bar']


def ask(pipe, i):
    "One request of a web server: its own number of steps, guidance and seed."
    return pipe(PROMPTS[i % 4], (1, 3, 4, 7)[i % 4], (1., 2., 3.)[i % 3], torch.Generator().manual_seed(i), 'pt', temperature=(1., .5)[i % 2])


@pytest.mark.parametrize('fast', [False, True])
def test_threads_get_what_each_asked_for(fast):
    pipe = FlowTokPipeline.from_pretrained()
    pipe = pipe.optimize() if fast else pipe
    alone = [ask(pipe, i) for i in range(40)]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda i: ask(pipe, i % 40), range(120)))
    assert all(torch.allclose(image, alone[i % 40], atol=1e-5) for i, image in enumerate(together))


def test_threads_may_caption_images_of_any_size_meanwhile():
    pipe, barrier = FlowTokPipeline.from_pretrained(), threading.Barrier(4)
    images = ask(pipe, 0)

    def work(i):
        barrier.wait()
        return [pipe.caption(images) for _ in range(5)] if i % 2 else [pipe.tokenizer.decode(torch.zeros(1, 16, 16), size=(64 + 64 * (i // 2), 64)).shape for _ in range(5)]
    with ThreadPoolExecutor(4) as threads:
        first, captions, second, others = threads.map(work, range(4))
    assert captions == others == [pipe.caption(images)] * 5
    assert {tuple(shape) for shape in first} == {(1, 3, 64, 64)} and {tuple(shape) for shape in second} == {(1, 3, 128, 64)}


def test_the_default_dtype_while_loading_changes_no_image():
    expected = ask(FlowTokPipeline.from_pretrained(), 0)
    torch.set_default_dtype(torch.float64)
    try:
        pipe = FlowTokPipeline.from_pretrained()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(ask(pipe, 0), expected)
