"""Drawings from a seed: what they are, that they are the same, and batches of them."""

import numpy as np
import pytest
import torch

from ppsr.data.bicubic import imresize_bicubic
from ppsr.data.synthetic_graphics import SyntheticGraphics, draw_graphics, graphics_batch, graphics_shape
from ppsr.errors import DataError


def options(**changes) -> dict:
    return {'name': 'drawings', 'scale': 4, 'gt_size': 64, 'phase': 'train'} | changes


def test_a_drawing_depends_on_its_seed_and_size_alone():
    np.random.seed(1)
    first = [draw_graphics(seed, 40, 56) for seed in range(40)]
    np.random.seed(2)
    again = [draw_graphics(seed, 40, 56) for seed in range(40)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert all(image.shape == (40, 56, 3) and image.dtype == np.uint8 for image in first)
    assert len({image.tobytes() for image in first}) > 25  # pure corners come more than once, all else does not


def test_all_kinds_appear():
    images = [draw_graphics(seed, 48, 48) for seed in range(300)]
    flat = [tuple(image[0, 0]) for image in images if (image == image[0, 0]).all()]
    assert 120 <= len(flat) <= 185
    corners = {(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255)}
    assert corners <= set(flat)
    assert any(len(set(colour)) == 1 and colour not in corners for colour in flat), 'grays'
    colours = [len(np.unique(image.reshape(-1, 3), axis=0)) for image in images]
    assert any(2 <= count <= 6 for count in colours), 'hard edges'
    assert any(count > 100 for count in colours), 'gradients and anti-aliasing'


@pytest.mark.parametrize('height, width', [(1, 1), (1, 9), (7, 3)])
def test_tiny_drawings(height, width):
    for seed in range(50):
        assert draw_graphics(seed, height, width).shape == (height, width, 3)


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_pairs_are_exact(scale):
    dataset = SyntheticGraphics(options(scale=scale, gt_size=48, length=30))
    assert len(dataset) == 30
    for sample in dataset:
        gt = (sample['gt'] * 255).round().byte().permute(1, 2, 0).numpy()
        lq = (sample['lq'] * 255).round().byte().permute(1, 2, 0).numpy()
        assert gt.shape == (48, 48, 3) and np.array_equal(lq, imresize_bicubic(gt, scale))


def test_the_seed_of_the_set_changes_its_drawings():
    zero, one = SyntheticGraphics(options()), SyntheticGraphics(options(seed=1))
    assert sum(torch.equal(zero[i]['gt'], one[i]['gt']) for i in range(20)) < 6
    with pytest.raises(IndexError):
        zero[10000]


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'gt_size': 30}, 'not a positive multiple of the scale 4'),
        ({'length': 0}, "length of data set 'drawings' must be a whole number of at least 1, but is 0"),
        ({'seed': 1.5}, "seed of data set 'drawings' must be a whole number of at least 0, but is 1.5"),
    ],
)
def test_wrong_options(changes, words):
    with pytest.raises(DataError, match=words):
        SyntheticGraphics(options(**changes))


def test_a_batch_of_drawings_has_no_more_pixels_than_the_one_that_it_replaces():
    rng = np.random.default_rng(0)
    shapes = [graphics_shape(rng, scale=4, gt_size=256, batch=3) for _ in range(200)]
    assert set(shapes) == {(3, 256), (6, 128), (12, 64)}
    assert shapes.count((12, 64)) > shapes.count((6, 128)) > shapes.count((3, 256)) > 0
    small = {graphics_shape(rng, scale=3, gt_size=48, batch=1) for _ in range(200)}
    assert small == {(1, 48), (2, 24)}  # 8 LR pixels at least
    assert {graphics_shape(rng, scale=3, gt_size=18, batch=1) for _ in range(50)} == {(1, 18)}
    assert {side % 3 for _, side in (graphics_shape(rng, scale=3, gt_size=150, batch=1) for _ in range(50))} == {0}


def test_a_batch_holds_the_drawings_of_its_seeds():
    batch = graphics_batch([5, 9], scale=3, gt_size=48)
    assert batch['lq'].shape == (2, 3, 16, 16) and batch['gt'].shape == (2, 3, 48, 48)
    assert batch['lq'].dtype == batch['gt'].dtype == torch.float32 and 0 <= batch['lq'].min() <= batch['lq'].max() <= 1
    for i, seed in enumerate((5, 9)):
        expected = draw_graphics(seed, 48, 48)
        assert np.array_equal((batch['gt'][i] * 255).round().byte().permute(1, 2, 0).numpy(), expected)
    assert batch['lq_path'] == ['drawing 5', 'drawing 9']
