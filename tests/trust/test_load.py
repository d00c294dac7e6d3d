"Long and heavy use: python -m pytest -q -s -m slow tests/trust/test_load.py (some two minutes)."
import resource
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from made import write

from flowtok.data.loader import open_batches
from flowtok.data.mixture import CaptionReader, find_sources
from flowtok.pipeline import FlowTokPipeline

pytestmark = pytest.mark.slow
PROMPTS = ['a blue star', 'a red ring top left', 'two green circles', 'a yellow cross and a purple bar', 'a pink circle on black']


def megabytes():
    "Resident memory now."
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 1e6


def test_a_million_samples_in_flat_memory(tmp_path):
    for i in range(20):
        write(tmp_path / 'data' / f'{i:02d}.tar', [{'txt': f'a {i} {k}'.encode()} for k in range(1000)])
    stream, used, began = open_batches(find_sources(tmp_path / 'data'), CaptionReader(), 500, seed=0), [], time.monotonic()
    captions = Counter()
    for step in range(2000):
        _, texts = next(stream)
        captions.update(texts)
        if step % 200 == 199:
            used.append(megabytes())
    print(f'{sum(captions.values()):,} samples, {sum(captions.values()) / (time.monotonic() - began):,.0f} a second, MB {[round(mb) for mb in used]}')
    assert sum(captions.values()) == 1_000_000 and len(captions) == 20_000 and max(captions.values()) - min(captions.values()) <= 15
    assert used[-1] - used[1] < 30


def test_eight_threads_of_fifty_prompts():
    pipe = FlowTokPipeline.from_pretrained().optimize()

    def ask(job):
        thread, i = divmod(job, 50)
        return pipe(PROMPTS[i % 5], 4 + thread, generator=torch.Generator().manual_seed(job), output_type='pt')
    alone = [ask(job) for job in range(0, 400, 7)]
    before, began = megabytes(), time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        images = list(threads.map(ask, range(400)))
    print(f'400 images by 8 threads, {400 / (time.monotonic() - began):.1f} a second, {megabytes() - before:.0f} MB more')
    assert all(torch.allclose(image, images[job], atol=1e-5) for image, job in zip(alone, range(0, 400, 7)))
    assert megabytes() - before < 500
