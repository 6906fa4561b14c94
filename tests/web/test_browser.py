"""The page in Chromium and over the wire; skipped, saying so, where Gradio, selenium or Chromium is missing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import pytest

from ppsr.archs import PPATDLight
from ppsr.images import write_file
from ppsr.pictures.upscaler import Upscaler
from ppsr.weights import save_checkpoint

pytest.importorskip('gradio')
ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = ('127.0.0.1', 'localhost', '::1')
# every host that the server asks for or speaks to goes into a file
WATCH = """import sys
def hook(event, args):
    if event == 'socket.getaddrinfo' or event == 'socket.connect' and isinstance(args[1], tuple):
        host = args[0] if event == 'socket.getaddrinfo' else args[1][0]
        with open({!r}, 'a') as file:
            print(host.decode() if isinstance(host, bytes) else host, file=file)
sys.addaudithook(hook)
"""
fetch = build_opener(ProxyHandler({})).open


class Page:
    """`ppsr web` in a process of its own, with a network of milliseconds."""

    def __init__(self, folder: Path, tiny: dict):
        self.folder, self.weights, self.temporary = folder, folder / 'tiny.safetensors', folder / 'tmp'
        save_checkpoint(self.weights, PPATDLight(**tiny).state_dict(), {'type': 'PPATDLight', **tiny})
        self.temporary.mkdir()
        (folder / 'hook').mkdir()
        (folder / 'hook' / 'sitecustomize.py').write_text(WATCH.format(str(folder / 'hosts')))
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            self.port = probe.getsockname()[1]
        self.address, self.log = f'http://127.0.0.1:{self.port}', folder / 'log'
        proxy = {'HTTP_PROXY': 'http://127.0.0.1:9', 'http_proxy': 'http://127.0.0.1:9'}  # nobody is there
        path = os.pathsep.join([str(folder / 'hook'), str(ROOT)])
        environment = {**os.environ, **proxy, 'TMPDIR': str(self.temporary), 'PYTHONPATH': path}
        limits = ['--max-upload', '1', '--max-megapixels', '0.01']
        with open(self.log, 'w') as log:
            self.process = subprocess.Popen(
                [sys.executable, '-m', 'ppsr', 'web', '--port', str(self.port), '--device', 'cpu']
                + ['--weights', str(self.weights), *limits],
                env=environment,
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + 120
        while 'Ctrl-C ends it' not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def ask(self, path: str, body: bytes | None = None, kind: str = 'application/json') -> tuple[int, str]:
        try:
            with fetch(Request(self.address + path, body, {'Content-Type': kind}), timeout=60) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    def upload(self, name: str, data: bytes) -> tuple[int, str]:
        head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + data + b'\r\n--b--\r\n'
        return self.ask('/gradio_api/upload', body, 'multipart/form-data; boundary=b')

    def enlarge(self, path: str, weights='tiny.safetensors') -> str:
        data = [{'path': path, 'meta': {'_type': 'gradio.FileData'}}, weights, '4', 'exact', 1]
        status, text = self.ask('/gradio_api/call/enlarge', json.dumps({'data': data}).encode())
        assert status == 200, text
        return self.ask(f'/gradio_api/call/enlarge/{json.loads(text)["event_id"]}')[1]

    def hosts(self) -> set[str]:
        return set((self.folder / 'hosts').read_text().split())


@pytest.fixture
def page(tmp_path, tiny):
    page = Page(tmp_path, tiny)
    yield page
    if page.process.poll() is None:
        page.process.kill()
        page.process.wait()


def picture(path: Path, *shape, dtype=np.uint8) -> Path:
    write_file(path, np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True))
    return path


def expected(page: Page, source: Path) -> bytes:
    file = page.folder / 'expected.png'
    Upscaler.from_pretrained(page.weights, device='cpu').upscale_file(source, file)
    return file.read_bytes()


def test_who_goes_around_the_page_meets_the_same_limits(page, tmp_path):
    good = picture(tmp_path / 'good.png', 12, 10, 3).read_bytes()
    status, text = page.upload('../../../evil.png', good)
    path = json.loads(text)[0]
    assert status == 200 and page.temporary in Path(path).resolve().parents and Path(path).name == 'evil.png'
    said = page.enlarge(path)
    assert 'event: complete' in said and 'evil_out.png' in said

    assert page.upload('large.png', bytes(2**20 + 1))[0] == 413
    for name, data, message in (
        ('wide.png', picture(tmp_path / 'wide.png', 101, 101, 3).read_bytes(), 'this page takes 0.01 megapixels'),
        ('text.png', b'no picture', '"text.png is not a picture'),  # without the folder that it lies in
        ('half.png', good[:60], '"half.png is damaged'),
    ):
        assert message in page.enlarge(json.loads(page.upload(name, data)[1])[0])
    for outside in ('/etc/passwd', str(tmp_path / 'good.png'), f'{path}/../../good.png'):
        assert 'event: error' in page.enlarge(outside)
        assert page.ask(f'/gradio_api/file={outside}')[0] in (403, 404)
    address = 'http://example.com/a.png'
    for said in (page.enlarge(address), page.enlarge(path, {'path': address, 'meta': {'_type': 'gradio.FileData'}})):
        assert 'no addresses' in said
    assert 'Choose weights' in page.enlarge(path, None)
    for route in ('run', 'api'):  # past the queue
        body = {'data': [{'path': path, 'meta': {'_type': 'gradio.FileData'}}, 'tiny.safetensors', '4', 'exact', 1]}
        assert page.ask(f'/gradio_api/{route}/enlarge', json.dumps(body).encode())[0] >= 400
    assert page.hosts() <= set(LOOPBACK), page.hosts()

    left = [file for file in page.temporary.rglob('*') if file.is_file()]
    assert sum(file.name == 'evil_out.png' for file in left) == 1  # no second copy
    page.process.send_signal(signal.SIGINT)
    assert page.process.wait(60) == 0 and not list(page.temporary.iterdir())


@pytest.fixture
def chromium(tmp_path):
    webdriver = pytest.importorskip('selenium.webdriver')
    browser = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    driver = shutil.which('chromedriver')
    if browser is None or driver is None:
        pytest.skip('no Chromium with its driver here (Debian: chromium, chromium-driver)')
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--window-size=1300,900'):
        options.add_argument(word)
    (tmp_path / 'downloads').mkdir()
    options.add_experimental_option('prefs', {'download.default_directory': str(tmp_path / 'downloads')})
    options.set_capability('goog:loggingPrefs', {'performance': 'ALL', 'browser': 'ALL'})
    chromium = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


def test_in_chromium(page, chromium, tmp_path):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(chromium, 60)

    def find(selector):
        return wait.until(lambda driver: driver.find_element('css selector', selector))

    def enlarge(source):
        find('#upload input[type=file]').send_keys(str(source))
        wait.until(lambda driver: source.stem in driver.find_element('css selector', '#upload').text)
        find('#enlarge').click()

    chromium.get(page.address)
    box = find('input[aria-label="weights"]')
    box.click()
    wait.until(lambda driver: [o for o in driver.find_elements('css selector', '[role=option]') if 'tiny' in o.text])[
        0
    ].click()

    source = picture(tmp_path / 'gray alpha.png', 13, 9, 2, dtype=np.uint16)
    enlarge(source)
    find('#slider img')
    wait.until(lambda driver: '13' in driver.find_element('css selector', '#text').text)
    images = wait.until(lambda driver: (found := driver.find_elements('css selector', '#slider img'))[1:] and found)
    wait.until(lambda driver: all(driver.execute_script('return arguments[0].naturalWidth', i) == 18 for i in images))

    line = find('#slider .outer')
    before = line.rect['x']
    ActionChains(chromium).drag_and_drop_by_offset(line, 60, 0).perform()
    wait.until(lambda driver: find('#slider .outer').rect['x'] > before + 30)

    find('#result a[download]').click()
    file = tmp_path / 'downloads' / 'gray alpha_out.png'
    wait.until(lambda driver: file.exists())
    assert file.read_bytes() == expected(page, source)

    chromium.refresh()
    text = tmp_path / 'text.png'
    text.write_text('no picture')
    enlarge(text)
    wait.until(lambda driver: 'text.png is not a picture' in driver.find_element('css selector', 'body').text)

    events = [json.loads(entry['message'])['message'] for entry in chromium.get_log('performance')]
    urls = [e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent']
    schemes = ('http', 'https', 'ws', 'wss')
    hosts = {urlsplit(url).hostname for url in urls if urlsplit(url).scheme in schemes}
    assert hosts == {'127.0.0.1'} and page.hosts() <= set(LOOPBACK)
