"""A headless Chromium, JupyterLab and the demo, for the tests of what a person sees.

`python tests/chromium.py FOLDER` stores screenshots of ten notebooks in JupyterLab, of the demo and, where `python tests/book.py` has built it, of the site at 1,200 and 400 pixels."""
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

root = Path(__file__).resolve().parents[1]
NOTEBOOKS = ('index', 'one_page', 'quickstart', 'train', 'playground', 'pipeline', 'flow/01_path', 'models/04_flowtok', 'losses/01_objective', 'experiments/one_network')


def free_port():
    with socket.socket() as some:
        some.bind(('127.0.0.1', 0))
        return some.getsockname()[1]


def wait_for(what, seconds=60):
    "The first true value of a function."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := what():
                return value
        except Exception:                                                        # a page that is still changing
            pass
        time.sleep(.2)
    raise TimeoutError('the page has not changed')


def programs():
    "Chromium and its driver, None where they are not there."
    return shutil.which('chromium') or shutil.which('google-chrome'), shutil.which('chromedriver')


def open_browser(width=1200, height=1000):
    "A driver of selenium."
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location, driver = programs()
    for word in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', f'--window-size={width},{height}'):
        options.add_argument(word)
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


@contextmanager
def serving(command, address, **environment):
    "A server for as long as the block runs, once it answers."
    server = subprocess.Popen([sys.executable, '-m', *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | environment)
    try:
        wait_for(lambda: urllib.request.urlopen(address).status == 200)
        yield
    finally:
        server.terminate()
        server.wait()


@contextmanager
def jupyterlab(folder, config):
    "JupyterLab over a folder: the address to which a notebook's path is added."
    port = free_port()
    command = ['jupyter', 'lab', '--no-browser', '--allow-root', f'--port={port}', '--IdentityProvider.token=', '--ServerApp.password=',
               '--LabApp.extension_manager=readonly', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', str(folder)]
    with serving(command, f'http://127.0.0.1:{port}/api', JUPYTER_CONFIG_DIR=str(config), PYTHONPATH=str(root)):
        yield f'http://127.0.0.1:{port}/doc/tree/'


@contextmanager
def demo():
    "The page of `flowtok demo`: its address."
    port = free_port()
    with serving(['flowtok.cli', 'demo', '--port', str(port)], f'http://127.0.0.1:{port}', GRADIO_ANALYTICS_ENABLED='False'):
        yield f'http://127.0.0.1:{port}'


def screenshots(folder: Path):
    "Store the screenshots."
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as config:
        shutil.copytree(root / 'nbs', Path(config) / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
        shutil.copytree(root / 'papers_results', Path(config) / 'papers_results', ignore=shutil.ignore_patterns('runs'))
        with jupyterlab(config, Path(config) / 'config') as address:
            for name in NOTEBOOKS:
                browser = open_browser(1200, 3000)
                browser.get(f'{address}nbs/{name}.ipynb')
                wait_for(lambda: browser.find_elements('css selector', '.jp-Notebook .jp-Cell'))
                time.sleep(5)                                                    # formulas and images
                browser.save_screenshot(str(folder / f"{name.replace('/', '_')}.png"))
                browser.quit()
                print(name, flush=True)
    site = root / '_docs' / '_build' / 'html' / 'nbs'
    for name in ('index', 'flow/01_path', 'models/04_flowtok') if (site / 'index.html').exists() else ():
        for width in (1200, 500, 400):
            browser = open_browser(width, 2400)
            browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {'width': width, 'height': 2400, 'deviceScaleFactor': 1, 'mobile': width < 600})
            browser.get((site / f'{name}.html').as_uri())
            time.sleep(3)
            wide = browser.execute_script('return document.documentElement.scrollWidth')
            browser.save_screenshot(str(folder / f"site_{name.replace('/', '_')}_{width}.png"))
            browser.quit()
            print('site', name, width, 'scrolls sideways to' if wide > width else 'is', wide, flush=True)
    with demo() as address:
        browser = open_browser()
        browser.get(address)
        wait_for(lambda: browser.find_element('css selector', '#draw')).click()
        wait_for(lambda: browser.find_elements('css selector', '#images img'))
        browser.save_screenshot(str(folder / 'demo.png'))
        browser.quit()


if __name__ == '__main__':
    if len(sys.argv) != 2 or not all(programs()):
        sys.exit('Give the folder of the screenshots; chromium and chromedriver have to be installed.')
    screenshots(Path(sys.argv[1]))
