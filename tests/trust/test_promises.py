"The page of promises names tests that exist."
import re
from pathlib import Path

root = Path(__file__).resolve().parents[2]


def test_every_promise_has_its_test():
    named = re.findall(r'`(tests/[\w/]+\.py)::(\w+)`', (root / 'nbs' / 'promises.md').read_text())
    assert len(named) > 20
    for file, name in named:
        assert re.search(rf'^def {name}\(', (root / file).read_text(), re.MULTILINE), f'{file}::{name}'


def test_front_page_and_security_lead_there():
    assert 'nbs/promises.md' in (root / 'README.md').read_text() and 'nbs/promises.md' in (root / 'SECURITY.md').read_text()
