"""The translations, operator by operator, run as they are (onnxscript's eager mode) against the definitions."""

import numpy as np
import pytest
import torch

pytest.importorskip('onnxscript')
pytest.importorskip('onnxruntime')

from ppsr.export import operators
from ppsr.masks import Gradient, PurePass, Variance
from ppsr.ops.category_attention import reference as category
from ppsr.ops.window_attention import reference as window


def array(x):
    return np.asarray(x.value if hasattr(x, 'value') else x)


def tensor(x):
    from onnxscript import tensor

    return None if x is None else tensor.Tensor(x.numpy())


@pytest.mark.parametrize(
    'n, g, shares, keep',
    [
        (63, 16, (0.4, 0.0, 1.0), True),
        (40, 16, (1.0, 1.0), False),
        (5, 16, (0.4, 0.0), True),
        (48, 16, None, True),
        (33, 16, (0.9, 0.1), False),
    ],
    ids=['ragged', 'all pure', 'less than a group', 'dense', 'less than a group beside more'],
)
def test_category_attention(n, g, shares, keep):
    images = len(shares) if shares else 2
    qkv, scale = torch.randn(images, n, 3 * 8), torch.tensor([[3.0]])
    labels = torch.randint(0, 5, (images, n))
    pure = torch.stack([torch.rand(n) < share for share in shares]) if shares else None
    found = operators.category_attention(
        tensor(qkv), tensor(labels), tensor(pure), tensor(scale), num_heads=2, category_size=g, keep=keep
    )[0]
    expected = category.forward(qkv.double(), labels, pure, scale.double(), 2, g, keep)[0]
    np.testing.assert_allclose(array(found), expected.numpy(), atol=2e-5)


@pytest.mark.parametrize('shift', [0, 2, 3])
@pytest.mark.parametrize('images, rows, columns', [(1, 1, 1), (2, 1, 3), (1, 3, 2)])
def test_window_attention(images, rows, columns, shift):
    size, heads = 4, 2
    qkv = torch.randn(images, rows * size, columns * size, 3 * 8)
    table = torch.randn((2 * size - 1) ** 2, heads)
    pure = torch.rand(qkv.shape[:3]) < 0.3 if shift == 2 else None
    found = operators.window_attention(tensor(qkv), tensor(table), tensor(pure), heads, size, shift)[0]
    expected = window.forward(qkv.double(), table.double(), pure, heads, size, shift)[0]
    np.testing.assert_allclose(array(found), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    'settings',
    [{}, dict(num_centers=5, fuse=False), dict(num_centers=40, window_size=3, shift=2), dict(window_size=20)],
    ids=str,
)
def test_colour_mask(settings):
    """Where the colours are ties for many centres, grays above all, one unit in the last place would change labels."""
    mask = PurePass(**settings)
    levels = torch.tensor([0, 0.1, 0.5, 0.9, 1])
    for size in ((2, 17, 26), (1, 3, 40), (1, 1, 1)):
        lq = torch.randint(256, (size[0], 3, *size[1:])) / 255
        lq[:, :, :12] = levels[torch.randint(5, (size[0], 1, *lq[0, 0, :12].shape))]  # grays
        lq[:, :, :, 9:22] = levels[torch.randint(5, (3,))][None, :, None, None]
        found = operators.colour_mask(tensor(lq), mask.num_centers, mask.window_size, mask.shift, mask.fuse)
        expected = mask(lq)
        assert np.array_equal(array(found), expected.numpy())
    assert PurePass()(torch.full((1, 3, 8, 8), 0.5)).all()


@pytest.mark.parametrize('num_centers', [8, 12, 64])
def test_labels_of_many_colours(num_centers):
    """Every gray of 8 bits, and random colours of 16: the same partition of the pixels as the mask's own."""
    from ppsr.masks.pure_pass import classify_pixels

    gray = (torch.arange(256) / 255).expand(3, 1, 256)
    colours = torch.cat([gray, torch.randint(65536, (3, 4, 256)) / 65535], 1)[None]
    found = array(operators.nearest_centre(tensor(colours), num_centers))[0, 0].astype(int)
    expected = classify_pixels(colours, num_centers)[0].numpy()
    pairs = set(zip(found.flatten(), expected.flatten()))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) > 2


@pytest.mark.parametrize('window_size', [1, 5])
def test_variance_mask(window_size):
    mask = Variance(0.05, window_size)
    lq = torch.randint(256, (2, 3, 9, 14)) / 255
    lq[..., 4:11] = 0.3 + 0.1 * torch.rand(2, 3, 9, 7)
    found = operators.variance_mask_of(tensor(lq), mask.threshold, window_size)
    assert np.array_equal(array(found), mask(lq).numpy())


def test_gradient_mask():
    mask = Gradient(0.05)
    lq = torch.randint(256, (2, 3, 9, 14)) / 255
    lq[..., 4:11] = 0.3 + 0.1 * torch.rand(2, 3, 9, 7)
    found = array(operators.gradient_mask_of(tensor(lq), mask.threshold))
    assert np.array_equal(found, mask(lq).numpy()) and 0 < found.sum() < found.size
