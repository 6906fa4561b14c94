"""What the page does with a picture, and mistakes of the command."""

import socket
import sys

import numpy as np
import pytest

from ppsr.archs import PPATDLight
from ppsr.cli import main
from ppsr.errors import UserError
from ppsr.images import read_picture, write_file
from ppsr.pictures.upscaler import Upscaler
from ppsr.web.page import EXACT, MAX_LOSS, SAVING, Limits, enlarge, wish_of
from ppsr.weights import save_checkpoint


@pytest.fixture
def weights(tmp_path, tiny):
    path = tmp_path / 'tiny.safetensors'
    save_checkpoint(path, PPATDLight(**tiny).state_dict(), {'type': 'PPATDLight', **tiny})
    return path


def picture(path, *shape, dtype=np.uint8):
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    image[: shape[0] // 2] = 90
    write_file(path, image)
    return path


@pytest.mark.parametrize(
    'shape, dtype', [((12, 10, 3), np.uint8), ((1, 1, 3), np.uint8), ((9, 8, 2), np.uint16)], ids=str
)
def test_a_picture_becomes_what_upscale_makes_of_it(tmp_path, weights, shape, dtype):
    source, seen = picture(tmp_path / 'a b.png', *shape, dtype=dtype), []
    result = enlarge(source, tmp_path, weights, device='cpu', on_tile=lambda *at: seen.append(at))
    upscaler = Upscaler.from_pretrained(weights, device='cpu')
    upscaler.upscale_file(source, tmp_path / 'expected.png')
    assert result.file.name == 'a b_out.png' and result.file.read_bytes() == (tmp_path / 'expected.png').read_bytes()
    before, after, mask = (read_picture(path).pixels for path in (result.before, result.after, result.mask))
    assert before.shape == after.shape == (shape[0] * upscaler.scale, shape[1] * upscaler.scale, 3)
    assert mask.shape[0] % shape[0] == 0 and seen[-1] == (1, 1)
    assert 'of the pixels are pure' in result.text
    assert 'Nothing was exempt' in enlarge(source, tmp_path, weights, how={'exact': True}, device='cpu').text


def test_the_dial():
    assert wish_of(MAX_LOSS, 20) == {'max_loss': 0.02} and wish_of(SAVING, 20) == {'saving': 20}
    assert wish_of(EXACT, 20) == {'exact': True} and wish_of('as the paper says', 20) == {}


def test_limits_and_mistakes_are_sentences(tmp_path, weights):
    source = picture(tmp_path / 'a.png', 12, 10, 3)
    text = tmp_path / 'text.png'
    text.write_text('no picture')
    for where, limits, how, message in (
        (source, Limits(upload=10), {}, 'a.png has more than'),
        (source, Limits(megapixels=1e-4), {}, '10×12 pixels'),
        (text, Limits(), {}, 'text.png'),
        (source, Limits(), {'max_loss': 0.02}, 'no curve'),
    ):
        with pytest.raises(UserError, match=message):
            enlarge(where, tmp_path, weights, how=how, limits=limits, device='cpu')
    assert not list(tmp_path.rglob('*_out.png'))


def test_mistakes_of_the_command(tmp_path, weights, capsys):
    pytest.importorskip('gradio')
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        for words, message in (
            (['--port', port], f'127.0.0.1:{port} cannot be served'),
            (['--host', 'no.such.host.invalid'], 'cannot be served'),
            (['--host', 70 * 'a' + '.b'], 'cannot be served'),
            (['--weights', tmp_path / 'none.pth'], 'none.pth'),
            (['--weights', weights, weights], 'two files of one name'),
            (['--max-memory', 'much'], 'not an amount of memory'),
        ):
            assert main(['web', *map(str, words)]) == 2
            said = capsys.readouterr().err
            assert message in said and len(said.strip().splitlines()) == 1


def test_without_gradio_the_command_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    assert main(['web']) == 2
    assert "pip install 'ppsr[web]'" in capsys.readouterr().err
