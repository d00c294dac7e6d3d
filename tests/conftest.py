"What several files of tests need."
import json
from pathlib import Path

import pytest
from made import image, write
from safetensors.torch import load_file

nano = Path(__file__).parent / 'goldens' / 'flowtok_nano'


@pytest.fixture(scope='session')
def golden():
    "Inputs and outputs of the authors' FlowTok, small and random."
    return load_file(nano / 'golden.safetensors')


@pytest.fixture(scope='session')
def described():
    "Its sizes, losses and tolerances."
    return json.loads((nano / 'golden.json').read_text())


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    "Five shards of seven images each, called number 0 to number 34."
    folder = tmp_path_factory.mktemp('shards')
    for k in range(5):
        write(folder / f'{k:05d}.tar', [{'png': image(seed=i), 'txt': f'number {i}'.encode()}
                                        for i in range(7 * k, 7 * k + 7)])
    return folder
