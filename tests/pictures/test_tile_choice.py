"""The tiles that memory allows."""

import os
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from picture_cases import Repeat, noise, png, repeat
from PIL import Image

from ppsr.errors import UserError
from ppsr.images import read_picture, write_file
from ppsr.pictures import memory
from ppsr.pictures.tile_choice import largest_tile
from ppsr.pictures.upscaler import Upscaler


@pytest.fixture
def fast():
    return Upscaler(Repeat(), device='cpu')


def test_no_tiles_while_memory_allows(fast, monkeypatch):
    monkeypatch.setattr(memory, 'free_memory', lambda device: 10 * 2**30)
    fast(noise(50, 60, 3))
    assert fast.stats.tile == 0 and fast.stats.tiles == 1


def test_tiles_from_the_memory_that_is_free(monkeypatch):
    net = Repeat()
    up = Upscaler(net, device='cpu', tile_overlap=8)
    measured = 1000.0
    monkeypatch.setattr(memory, 'measure_bytes_per_pixel', lambda run, device: measured)
    image = noise(300, 400, 3)
    monkeypatch.setattr(memory, 'free_memory', lambda device: 60 * 2**20)
    np.testing.assert_array_equal(up(image), repeat(image))
    small = up.stats.tile
    assert 0 < small < 300 and measured * small**2 < 60 * 2**20
    monkeypatch.setattr(memory, 'free_memory', lambda device: 100 * 2**20)
    up(image)
    assert small < up.stats.tile
    monkeypatch.setattr(memory, 'free_memory', lambda device: 2**20)
    with pytest.raises(UserError, match='at least'):
        up(image)


def test_max_memory_limits_the_process(monkeypatch):
    monkeypatch.setattr(memory, 'measure_bytes_per_pixel', lambda run, device: 1000.0)
    monkeypatch.setattr(memory, 'free_memory', lambda device: 100 * 2**30)
    monkeypatch.setattr(memory, 'used_memory', lambda device: 500 * 2**20)
    image = noise(300, 400, 3)
    up = Upscaler(Repeat(), device='cpu', max_memory='560M', tile_overlap=8)
    up(image)
    assert 0 < up.stats.tile < 300
    with pytest.raises(UserError, match='allowed'):
        Upscaler(Repeat(), device='cpu', max_memory='400M')(image)
    with pytest.raises(UserError, match='amount of memory'):
        Upscaler(Repeat(), device='cpu', max_memory='lots')


@pytest.mark.parametrize('tile, used', [(0, None), (200, None), (64, 64), (None, None)])
def test_a_memory_limit_is_kept_whatever_tile_is_asked_for(monkeypatch, tile, used):
    monkeypatch.setattr(memory, 'measure_bytes_per_pixel', lambda run, device: 1000.0)
    monkeypatch.setattr(memory, 'used_memory', lambda device: 500 * 2**20)
    said, image = [], noise(300, 400, 3)
    up = Upscaler(Repeat(), device='cpu', max_memory='530M', tile=tile, tile_overlap=8, say=said.append)
    np.testing.assert_array_equal(up(image), repeat(image))
    assert 0 < up.stats.tile < 200 and up.stats.tile == (used or up.stats.tile)
    assert len(said) == (tile in (0, 200))


def test_too_little_memory_to_open_the_picture(tmp_path):
    write_file(tmp_path / 'x.png', noise(50, 60, 3))
    with pytest.raises(UserError, match='to be opened'):
        Upscaler(Repeat(), device='cpu', max_memory='10M')(tmp_path / 'x.png')
    with open(tmp_path / 'x.png', 'rb') as file, pytest.raises(UserError, match='to be opened'):
        Upscaler(Repeat(), device='cpu', max_memory='10M').read(file)


@pytest.mark.parametrize('form', ['png', 'tiff', 'ppm', 'jpg'])
def test_a_named_pipe_is_read_once_with_a_memory_limit_too(tmp_path, form):
    path, pipe, pixels = tmp_path / f'x.{form}', tmp_path / 'pipe', noise(20, 30, 3)
    Image.fromarray(pixels).save(path)
    os.mkfifo(pipe)
    writer = subprocess.Popen(['cp', str(path), str(pipe)])
    try:
        found = Upscaler(Repeat(), device='cpu', max_memory='64G').read(pipe).pixels
    finally:
        writer.kill()
        writer.wait()
    np.testing.assert_array_equal(found, read_picture(path).pixels)


class Hungry(Repeat):
    """Runs out of memory, as PyTorch says it, with more than `limit` pixels."""

    limit = 900

    def forward(self, x):
        if x.shape[-1] * x.shape[-2] > self.limit:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"
            )
        return super().forward(x)


def test_out_of_memory_tries_smaller_tiles_and_says_so(tmp_path):
    said, image = [], noise(100, 90, 3)
    up = Upscaler(Hungry(), device='cpu', tile_overlap=4, say=said.append)
    np.testing.assert_array_equal(up(image), repeat(image))
    assert len(said) == 2 and 'the whole image: trying 48' in said[0] and 'tiles of 48: trying 16' in said[1]
    assert up.stats.tile == 16
    up.upscale_file(png(tmp_path / 'x.png', image), tmp_path / 'y.png')
    np.testing.assert_array_equal(read_picture(tmp_path / 'y.png').pixels, repeat(image))
    up.net.limit = 10
    with pytest.raises(UserError, match='even with tiles'):
        up(image)


def test_other_errors_are_not_taken_for_lack_of_memory():
    class Wrong(Repeat):
        def forward(self, x):
            raise RuntimeError('shape mismatch')

    with pytest.raises(RuntimeError, match='shape mismatch'):
        Upscaler(Wrong(), device='cpu')(noise(4, 4, 3))


@given(st.floats(0, 1e12), st.floats(1, 1e5), st.floats(0, 1e7), st.integers(0, 64))
def test_the_largest_tile_fits_and_is_the_largest(allowed, per_pixel, per_row, overlap):
    tile = largest_tile(allowed, per_pixel, per_row, overlap, 16)
    larger = tile + 16
    assert tile % 16 == 0
    if tile:
        assert tile**2 * per_pixel + tile * per_row <= allowed * (1 + 1e-9) and tile >= 2 * overlap + 16
    else:
        larger = -(-(2 * overlap + 16) // 16) * 16
    assert larger**2 * per_pixel + larger * per_row > allowed * (1 - 1e-9)
