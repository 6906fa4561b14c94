"""MATLAB's bicubic resize, against published LR images, hand-computed numbers and a plain loop in exact fractions."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from ppsr.data.bicubic import imresize_bicubic, modcrop

DATA = Path(os.environ.get('PPSR_DATA', Path(__file__).resolve().parents[3] / 'shared' / 'data'))


def exact_cubic(x: Fraction) -> Fraction:
    x = abs(x)
    if x <= 1:
        return Fraction(3, 2) * x**3 - Fraction(5, 2) * x**2 + 1
    if x <= 2:
        return Fraction(-1, 2) * x**3 + Fraction(5, 2) * x**2 - 4 * x + 2
    return Fraction(0)


def exact_resize_rows(img: np.ndarray, scale: int, up: bool) -> np.ndarray:
    """The definition, one output row at a time, in rational arithmetic."""
    height = img.shape[0]
    factor, stretch = (Fraction(1, scale), 1) if up else (Fraction(scale), scale)
    rows = []
    for y in range(height * scale if up else -(-height // scale)):
        centre = (y + Fraction(1, 2)) * factor - Fraction(1, 2)
        taps = range(int(centre) - 2 * stretch - 2, int(centre) + 2 * stretch + 3)
        weight = [exact_cubic((centre - tap) / stretch) for tap in taps]
        mirrored = [min(tap % (2 * height), 2 * height - 1 - tap % (2 * height)) for tap in taps]
        row = sum(w * img[i].astype(object) for w, i in zip(weight, mirrored)) / sum(weight)
        rows.append([min(max(int((2 * value + 1) // 2), 0), 255) for value in row])
    return np.array(rows, np.uint8)


def exact_resize(img: np.ndarray, scale: int, up: bool) -> np.ndarray:
    return exact_resize_rows(exact_resize_rows(img, scale, up).T, scale, up).T


@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.parametrize('name', ['baby', 'bird', 'butterfly', 'head', 'woman'])
def test_bit_exact_with_published_set5(name, scale):
    hr_path, lr_path = DATA / f'Set5/HR/{name}.png', DATA / f'Set5/LRbicx{scale}/{name}x{scale}.png'
    if not (hr_path.exists() and lr_path.exists()):
        pytest.skip(f'published LR images are not under {DATA} (set PPSR_DATA)')
    hr = np.asarray(Image.open(hr_path).convert('RGB'))
    lr = np.asarray(Image.open(lr_path).convert('RGB'))
    np.testing.assert_array_equal(imresize_bicubic(modcrop(hr, scale), scale), lr)


def test_hand_computed_half():
    # A step 0 -> 200 in the middle of 8 pixels. Weights of scale 2 at distances 0.5, 1.5, 2.5, 3.5 (in HR pixels):
    # cubic(d / 2) / 2 = 111/256, 29/256, -9/256, -3/256 on each side of the centre. Output pixel 1 has its centre at
    # 2.5: columns 4, 5, 6 of the right half are at 1.5, 2.5, 3.5 -> 200 * (29 - 9 - 3) / 256 = 13.28 -> 13.
    # Output pixel 0 (centre 0.5) sees only column 4, at 3.5: -2.3 -> 0. Pixel 2 (centre 4.5) misses columns 1, 2, 3 at
    # 3.5, 2.5, 1.5: 200 - 13.28 = 186.72 -> 187. Pixel 3 misses column 3 only: 202.3 -> 202.
    step = np.array([[0, 0, 0, 0, 200, 200, 200, 200]], np.uint8)
    np.testing.assert_array_equal(imresize_bicubic(step.repeat(2, axis=0), 2), [[0, 13, 187, 202]])


def test_rounds_halves_up_after_each_pass():
    # Two rows 0 and 1 are symmetric about the one output row and average to 0.5, which becomes 1 in the first pass; the
    # second pass sees 1 everywhere and keeps it.
    img = np.array([[0, 0], [1, 1]], np.uint8)
    np.testing.assert_array_equal(imresize_bicubic(img, 2), [[1]])
    # With columns 0 and 1 instead, the rows pass keeps 0 and 1 and the columns pass rounds 0.5 to 1.
    np.testing.assert_array_equal(imresize_bicubic(img.T.copy(), 2), [[1]])
    # Rows pass: (0, 1) -> 1 in column 0, (0, 0) -> 0 in column 1; columns pass: (1, 0) -> 0.5 -> 1. Rounding once at
    # the end would give 0.25 -> 0.
    np.testing.assert_array_equal(imresize_bicubic(np.array([[0, 0], [1, 0]], np.uint8), 2), [[1]])


@pytest.mark.parametrize('up', [False, True], ids=['down', 'up'])
@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.parametrize('shape', [(1, 1), (1, 7), (5, 3), (13, 17), (24, 36)], ids=str)
def test_equals_definition_in_fractions(shape, scale, up):
    if up and shape == (24, 36):
        shape = (6, 5)
    img = np.random.default_rng(shape[0] * 100 + scale).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(imresize_bicubic(img, scale, up), exact_resize(img, scale, up))


images = hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3)))


@settings(max_examples=60, deadline=None)
@given(images, st.sampled_from([2, 3, 4]), st.booleans())
def test_invariants(img, scale, up):
    out = imresize_bicubic(img, scale, up)
    height, width, channels = img.shape
    if up:
        assert out.shape == (height * scale, width * scale, channels)
    else:
        assert out.shape == (-(-height // scale), -(-width // scale), channels)
    assert out.dtype == np.uint8
    # every channel is resized by itself
    np.testing.assert_array_equal(out[..., 0], imresize_bicubic(img[..., 0], scale, up))
    # a mirrored image gives the mirrored result where the grid is symmetric
    if up or (height % scale == 0 and width % scale == 0):
        np.testing.assert_array_equal(out[::-1, ::-1], imresize_bicubic(img[::-1, ::-1], scale, up))


@pytest.mark.parametrize('value', [0, 1, 127, 255])
@pytest.mark.parametrize('scale', [1, 2, 3, 4, 8])
def test_constant_stays_constant(value, scale):
    img = np.full((24, 48, 3), value, np.uint8)
    for up in (False, True):
        assert (imresize_bicubic(img, scale, up) == value).all()


def test_constant_along_one_axis_is_separable():
    row = np.random.default_rng(0).integers(0, 256, (1, 24), dtype=np.uint8)
    tall = imresize_bicubic(row.repeat(16, axis=0), 4)
    np.testing.assert_array_equal(tall, np.repeat(imresize_bicubic(row.repeat(4, axis=0), 4), 4, axis=0))


def test_scale_one_is_identity_and_input_is_left_alone():
    img = np.random.default_rng(1).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    before = img.copy()
    np.testing.assert_array_equal(imresize_bicubic(img, 1), img)
    imresize_bicubic(img[::-1, ::2], 2)
    np.testing.assert_array_equal(img, before)


def test_modcrop():
    assert modcrop(np.zeros((10, 7, 3), np.uint8), 4).shape == (8, 4, 3)
    assert modcrop(np.zeros((9, 6), np.uint8), 3).shape == (9, 6)
    assert modcrop(np.zeros((3, 6), np.uint8), 4).shape == (0, 4)


@pytest.mark.parametrize(
    'img, scale, error',
    [
        (np.zeros((4, 4), np.float32), 2, TypeError),
        ([[1, 2], [3, 4]], 2, TypeError),
        (np.zeros((4,), np.uint8), 2, ValueError),
        (np.zeros((0, 4), np.uint8), 2, ValueError),
        (np.zeros((4, 4), np.uint8), 0, ValueError),
        (np.zeros((4, 4), np.uint8), 2.5, ValueError),
    ],
)
def test_refuses_what_it_cannot_do(img, scale, error):
    with pytest.raises(error):
        imresize_bicubic(img, scale)
