"The page of the demo and the playground, as a person uses them in a browser."
import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import demo, jupyterlab, open_browser, programs, wait_for
from readme import root

from flowtok.demo import _Studio
from flowtok.pipeline import FlowTokPipeline

pictures = os.environ.get('FLOWTOK_SCREENSHOTS')  # a folder: screenshots are kept there


@pytest.fixture(scope='module')
def pipe(): return FlowTokPipeline.from_pretrained()


def close(a, b): return np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 2


def test_a_seed_gives_its_image_whoever_else_draws(pipe):
    studio, results = _Studio(pipe), {}
    alone = {seed: studio.draw('a blue star', 2, seed, steps=4) for seed in range(4)}

    def user(seed): results[seed] = studio.draw('a blue star', 2, seed, steps=4)
    users = [threading.Thread(target=user, args=(seed,)) for seed in range(4)]
    for one in users:
        one.start()
    for one in users:
        one.join()
    for seed in range(4):
        assert [image.tobytes() for image, _ in results[seed]] == [image.tobytes() for image, _ in alone[seed]]
        assert close(alone[seed][1][0], studio.draw('a blue star', 1, seed + 1, steps=4)[0][0])      # in a batch of another size
    along = studio.draw('a blue star', 3, 0, steps=4, along=True)
    assert len(along) == 5 and close(along[-1][0], alone[0][0][0])
    assert studio.caption(alone[0][0][0])
    for wrong in (lambda: studio.draw('a blue elephant'), lambda: studio.draw('a star', steps=0), lambda: studio.draw('a star', temperature=9), lambda: studio.caption(None)):
        with pytest.raises(ValueError):
            wrong()


@pytest.fixture(scope='module')
def browser():
    pytest.importorskip('selenium', reason="needs pip install selenium")
    if not all(programs()):
        pytest.skip('needs chromium and chromedriver')
    driver = open_browser()
    yield driver
    driver.quit()


def keep(browser, name):
    if pictures:
        Path(pictures).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(pictures) / f'{name}.png'))


def test_the_page_draws_a_prompt_and_captions_an_image(pipe, browser, tmp_path):
    pytest.importorskip('gradio', reason="needs pip install 'flowtok[demo]'")
    with demo() as address:
        browser.get(address)
        prompt = wait_for(lambda: browser.find_element('css selector', '#prompt textarea'))
        prompt.clear()
        prompt.send_keys('a red ring')
        wait_for(lambda: browser.find_element('css selector', '#draw')).click()
        images = wait_for(lambda: browser.find_elements('css selector', '#images img'))
        keep(browser, 'demo')
        assert len(images) >= 4
        prompt.clear()
        prompt.send_keys('a red elephant')
        browser.find_element('css selector', '#draw').click()
        assert wait_for(lambda: 'elephant' in browser.find_element('css selector', '.toast-body, .toast-wrap').text)   # the sentence of the error
        wait_for(lambda: [tab for tab in browser.find_elements('css selector', 'button[role=tab]') if 'Image to text' in tab.text])[0].click()
        file = tmp_path / 'ring.png'
        pipe('a red ring', generator=torch.Generator().manual_seed(0))[0].save(file)
        wait_for(lambda: browser.find_element('css selector', '#image input[type=file]')).send_keys(str(file))
        caption = wait_for(lambda: browser.find_element('css selector', '#caption textarea').get_attribute('value'))
        keep(browser, 'demo_caption')
        assert caption == pipe.caption(file)[0] and 'red' in caption


def test_the_playground_draws_in_jupyterlab(browser, tmp_path):
    folder = tmp_path / 'nbs'
    folder.mkdir()
    shutil.copyfile(root / 'nbs' / 'playground.ipynb', folder / 'playground.ipynb')
    with jupyterlab(folder, tmp_path / 'config') as address:
        browser.get(f'{address}playground.ipynb')
        wait_for(lambda: browser.find_elements('css selector', '.jp-Notebook .jp-Cell'))
        menu = wait_for(lambda: [item for item in browser.find_elements('css selector', '.lm-MenuBar-item') if item.text == 'Run'])[0]
        menu.click()
        wait_for(lambda: [item for item in browser.find_elements('css selector', '.lm-Menu-item') if item.text.startswith('Run All Cells')])[0].click()

        def message(): return next((one.text for one in browser.find_elements('css selector', '.widget-html-content') if re.search('images of|unknown', one.text)), '')
        assert "'a blue star'" in wait_for(message, 120)
        field = browser.find_element('css selector', '.widget-text input[type=text]')
        field.clear()
        field.send_keys('a pink circle\n')
        wait_for(lambda: "'a pink circle'" in message())
        assert wait_for(lambda: browser.find_elements('css selector', 'img.widget-image, .widget-image img'))
        keep(browser, 'playground')
