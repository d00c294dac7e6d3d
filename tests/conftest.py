"What several files of tests need."
import json
from pathlib import Path

import pytest
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
