"""Hostile and broken input: never code run, never a file outside the run's folder, never a traceback to the user.

The properties are those of tests/fuzz.py, driven by hypothesis; the rest are attacks that have a name.
"""

import contextlib
import pickle
import random
import struct
import textwrap
import zlib
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import Process
from tiny_training import options, write_options, write_pairs

from ppsr.cli import main
from ppsr.errors import UserError
from ppsr.masks.pure_pass import classify_pixels, pure_mask
from ppsr.ops.category_attention import category_attention
from ppsr.ops.dispatch import available, use_backend
from ppsr.ops.window_attention import window_attention
from ppsr.runtime import threads
from ppsr.training.options import load_options
from ppsr.weights import read_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module', autouse=True)
def quiet():
    import logging

    logging.disable(logging.WARNING)
    with threads(1):
        yield
    logging.disable(logging.NOTSET)


# --------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize('kind', fuzz.KINDS)
@pytest.mark.filterwarnings('ignore')
def test_never_a_traceback_a_wrong_shape_or_nan(kind):
    @settings(max_examples=40)
    @given(st.integers(0, 2**32 - 1))
    def case(seed):
        fuzz.KINDS[kind](random.Random(seed))

    case()


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50)
@given(where=st.sampled_from(['name', 'scale', 'num_gpu', 'path', 'train', 'val', 'logger', 'datasets']), value=values)
def test_any_value_in_place_of_a_section(where, value):
    path = write_options(fuzz.workplace() / 'hypothesis', options(fuzz.workplace(), **{where: value}))
    with contextlib.suppress(UserError):
        opt = load_options(path, is_train=True, root=fuzz.workplace())
        assert Path(opt['path']['experiments_root']).parent == fuzz.workplace() / 'experiments'


# ------------------------------------------------------------------------------------------------------ code in pickles


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path('executed'),)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / 'executed').exists(), 'code of the file was run'


@pytest.mark.parametrize('where', ['top', 'params', 'beside', 'plain pickle'])
def test_code_in_weights_is_refused(here, where):
    weights = {'w': torch.ones(1)}
    content = {
        'top': Evil(),
        'params': {'params': {'w': Evil()}},
        'beside': {'params': weights, 'extra': Evil()},
        'plain pickle': Evil(),
    }[where]
    if where == 'plain pickle':
        Path('net.pth').write_bytes(pickle.dumps(content))
    else:
        torch.save(content, 'net.pth')
    with pytest.raises(UserError, match='net.pth'):
        read_checkpoint('net.pth')
    assert main(['upscale', '-i', 'x.png', '-o', 'out', '-n', 'net.pth']) == 2


@pytest.mark.parametrize(
    'yaml',
    [
        '!!python/object/apply:pathlib.Path.touch [executed]',
        '!!python/object/apply:os.system ["touch executed"]',
        '!!python/name:os.system',
        '!!python/object/new:pathlib.PosixPath [executed]',
    ],
)
def test_code_in_options_is_refused(here, yaml):
    path = write_options(here, options(here))
    path.write_text(path.read_text().replace('name: run', f'name: {yaml}'))
    with pytest.raises(UserError, match='not valid YAML'):
        load_options(path, is_train=True)
    path.write_text(path.read_text().replace(f'name: {yaml}', 'name: run'))
    with pytest.raises(UserError, match='not valid YAML'):
        load_options(path, is_train=True, force_yml=[f'name={yaml}'])


def test_forced_values_are_not_evaluated(here):
    """basicsr calls eval() on them."""
    path = write_options(here, options(here))
    with pytest.raises(UserError):
        load_options(path, is_train=True, force_yml=["name=__import__('pathlib').Path('executed').touch()"])


@pytest.mark.parametrize(
    'bomb',
    [
        'a: &a [*a]',
        'a: &a {b: *a}',
        '\n'.join(['a0: &a0 [x, x]', *(f'a{i}: &a{i} [*a{i - 1}, *a{i - 1}]' for i in range(1, 64))]),
    ],
    ids=['list in itself', 'mapping in itself', 'billion laughs'],
)
def test_yaml_bombs_are_refused(here, bomb):
    path = write_options(here, options(here))
    path.write_text(path.read_text() + bomb)
    with pytest.raises(UserError, match='unfolds into more than'):
        load_options(path, is_train=True)


# -------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize('name', ['../out', '/tmp/out', 'a/b', '..', '.', '', 'a\\b', 'a\x00b', '~', 'a\nb', '$HOME'])
def test_no_path_out_of_the_folder_through_names(here, name):
    for key in ('name', 'val__suffix', 'datasets__val__name'):
        path = write_options(here, options(here, **{key: name}))
        with pytest.raises(UserError, match='becomes a file name'):
            load_options(path, is_train=True)


@pytest.mark.parametrize('key', ['models', 'training_states', 'log', 'visualization', 'experiments_root', 'root'])
def test_no_path_out_of_the_folder_through_paths(here, key):
    path = write_options(here, options(here, path={key: '/tmp/elsewhere'}))
    with pytest.raises(UserError, match=f'path: unknown option {key!r}'):
        load_options(path, is_train=True)


# -------------------------------------------------------------------------------------------------------- large images


def _png(width: int, height: int, bits: int, colour: int) -> bytes:
    """A PNG of zeros that claims to be this large; compressed twice over it would still be a few KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, bits, colour, 0, 0, 0))
    data = chunk(b'IDAT', zlib.compress(bytes(2_000_000), 9))
    return b'\x89PNG\r\n\x1a\n' + header + data + chunk(b'IEND', b'')


def test_decompression_bombs_are_refused_before_memory_is_taken(tmp_path):
    """100,000 × 100,000 pixels in a few KB; 1 to 80 GB if they were decoded. Measured in a process of its own."""
    for name, bits, colour in (('rgb', 8, 2), ('bilevel', 1, 0), ('rgba16', 16, 6)):
        (tmp_path / f'{name}.png').write_bytes(_png(100_000, 100_000, bits, colour))
        assert (tmp_path / f'{name}.png').stat().st_size < 10_000
    code = """
        import pathlib, resource
        from ppsr.images import decode_rgb
        from ppsr.errors import UserError
        from ppsr.images import read_picture
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in sorted(pathlib.Path('.').glob('*.png')):
            for read in (read_picture, lambda path: decode_rgb(path.read_bytes(), str(path))):
                try:
                    read(path)
                except UserError as e:
                    print('refused:', e)
        print('MiB:', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    process = Process(textwrap.dedent(code), cwd=tmp_path)
    assert process.wait() == 0, process.stderr
    said = process.stdout.decode()
    refused = [line for line in said.splitlines() if line.startswith('refused:') and '.png' in line]
    assert len(refused) == 6, said
    assert int(said.split('MiB:')[1]) < 100


# ------------------------------------------------------------------------------------------------------------ commands


NAME = 'a' * 300  # longer than the name of a file may be


@pytest.mark.parametrize(
    'command',
    [
        f'upscale -i {NAME}.png -o out',
        f'upscale -i p.png -o {NAME}.png',
        f'upscale -i p.png -o out.png --model-path {NAME}.pth',
        f'mask -i {NAME}.png -o out.png',
        f'compare -i {NAME}.png -o out.png',
        f'convert -i {NAME}.pth -o out.pth',
        f'purity --data {NAME}',
        f'prepare --hr {NAME} --name A --scale 2 -o out',
        f'complexity -opt {NAME}',
        f'tables --data {NAME}',
        f'train -opt {NAME}',
        f'test -opt {NAME}',
        f'study -opt {NAME}',
    ],
    ids=lambda command: command.replace(NAME, 'NAME'),
)
def test_names_that_no_file_can_have_are_one_sentence(here, capfd, command):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save('p.png')
    capfd.readouterr()
    assert main(command.split()) == 2
    said = capfd.readouterr().err
    assert said.startswith('ppsr: error: ') and said.count('\n') == 1
    assert [path for path in here.rglob('*') if path.is_file()] == [here / 'p.png']


def test_training_from_a_broken_picture_is_one_sentence(here, capfd):
    """Not found before training because its header is whole; met in training."""
    write_pairs(here / 'data', 4)
    for kind in ('hr', 'lr'):
        file = here / 'data' / kind / '002.png'
        file.write_bytes(file.read_bytes()[:-60])
    path = write_options(here, options(here / 'data', val=None))
    capfd.readouterr()
    assert main(['train', '-opt', str(path)]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith('ppsr: error')]
    assert len(error) == 1 and '002.png' in error[0]


def test_unusual_arrays_do_not_break_the_mask():
    """NaN and infinities count as some colour; nothing raises, nothing spreads to other pixels' labels."""
    x = torch.rand(1, 3, 8, 8)
    expected = classify_pixels(x)
    x[0, :, 0, 0] = torch.tensor([np.nan, np.inf, -np.inf])
    found = classify_pixels(x)
    assert ((found == expected) | (torch.arange(64).view(1, 8, 8) == 0)).all()


@pytest.mark.parametrize('shape', [(0, 3, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0)])
def test_mask_of_nothing_is_empty(shape):
    assert pure_mask(torch.zeros(shape)).shape == (shape[0], *shape[2:])


@pytest.mark.parametrize('backend', ['reference', 'torch', 'native'])
def test_gradient_of_huge_logits_is_finite(backend):
    """Rounding of a logit of 10⁹ is as large as the logits of a trained network: exp of it must not overflow."""
    if available(backend) is not None:
        pytest.skip(available(backend))
    qkv = (torch.randn(1, 130, 96) * 1e3).requires_grad_()
    category, scale = torch.zeros(1, 130, dtype=torch.int64), torch.tensor([100.0])
    with use_backend(backend):
        category_attention(qkv, category, scale, num_heads=4, category_size=16).sum().backward()
        maps = qkv.detach().view(1, 10, 13, 96)[:, :8, :8].contiguous().requires_grad_()
        window_attention(maps, torch.zeros(49, 4), num_heads=4, window_size=4, shift=2).sum().backward()
    assert qkv.grad.isfinite().all()
    assert maps.grad.isfinite().all()
