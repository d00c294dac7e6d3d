"""Images and shards that tests make for themselves."""
import io
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image


def image(height=16, width=16, seed=0, mode='RGB', kind='png', **how):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind, **how)
    return file.getvalue()


def write(path, samples):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path), encoder=False, mtime=0) as sink:
        for i, sample in enumerate(samples):
            sink.write({'__key__': f'{i:05d}', **sample})
    return str(path)


def saved(image, kind='png', **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()
