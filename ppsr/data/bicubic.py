"""MATLAB's ``imresize(img, factor, 'bicubic')`` on uint8 images, bit for bit: the field's degradation.

The published low-resolution images of Set5, Set14, DIV2K and the others were made by that MATLAB function. basicsr's
own ``imresize`` computes in float and rounds once at the end, so that 10-15 % of its samples are off, by up to 2.
What MATLAB does with uint8 images, checked against published LR images (tests/data/test_bicubic.py):

- the first axis (rows) is resized, then the second one (columns);
- the result of EACH of the two passes is rounded to uint8, halves away from zero, and clipped to [0, 255];
- when the image shrinks, the cubic kernel (a = -0.5) is stretched by the scale, which removes aliasing;
- beyond its border the image continues as in a mirror, the edge pixel repeated.

At the scales 2, 3, 4 and 8 the order of summation cannot change the result: the weights are multiples of a small power
of two, exact in float64, or, at scale 3, of 1/81, and no sum comes near a half.
"""

from functools import lru_cache

import numpy as np
from scipy.sparse import csr_array

__all__ = ['imresize_bicubic', 'modcrop']


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel with a = -0.5, the one of MATLAB; zero outside [-2, 2]."""
    x = np.abs(x)
    inner = (1.5 * x - 2.5) * x**2 + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, inner, np.where(x <= 2, outer, 0.0))


@lru_cache(maxsize=64)
def _weights(length: int, scale: int, up: bool) -> csr_array:
    """The (out_length, length) float64 matrix that resizes one axis; every row sums to 1."""
    if up:
        out_length, stretch = length * scale, 1
        centre = (np.arange(out_length) + 0.5) / scale - 0.5
    else:
        out_length, stretch = -(-length // scale), scale
        centre = (np.arange(out_length) + 0.5) * scale - 0.5
    taps = 4 * stretch + 2
    index = np.floor(centre - 2 * stretch).astype(np.int64)[:, None] + np.arange(taps)
    weight = _cubic((centre[:, None] - index) / stretch)
    weight /= weight.sum(axis=1, keepdims=True)
    index %= 2 * length  # a mirror at both borders repeats with period 2 * length
    index = np.where(index < length, index, 2 * length - 1 - index)
    rows = np.repeat(np.arange(out_length), taps)
    matrix = csr_array((weight.ravel(), (rows, index.ravel())), shape=(out_length, length))
    matrix.eliminate_zeros()
    return matrix


def _resize_rows(img: np.ndarray, scale: int, up: bool) -> np.ndarray:
    """Resize the first axis of a uint8 array and round to uint8."""
    weights = _weights(img.shape[0], scale, up)
    out = weights @ img.reshape(img.shape[0], -1).astype(np.float64)
    # floor(x + 0.5) is MATLAB's round for x >= 0; below zero everything is clipped anyway
    out = np.clip(np.floor(out + 0.5), 0, 255).astype(np.uint8)
    return out.reshape(weights.shape[0], *img.shape[1:])


def imresize_bicubic(img: np.ndarray, scale: int, up: bool = False) -> np.ndarray:
    """Shrink (or enlarge) a uint8 image as MATLAB's bicubic ``imresize`` does, bit for bit.

    Args:
        img: uint8 array of shape (H, W) or (H, W, C), any channel order, H and W at least 1.
        scale: positive integer. The image shrinks by this scale with antialiasing: MATLAB's ``imresize(img, 1/scale)``.
        up: enlarge by ``scale`` instead, without antialiasing: MATLAB's ``imresize(img, scale)``.

    Returns:
        uint8 array of shape (ceil(H / scale), ceil(W / scale)[, C]), or (H * scale, W * scale[, C]) with ``up``.
        Crop with :func:`modcrop` first for the low-resolution images of the super-resolution protocol.

    Raises:
        TypeError: ``img`` is not a uint8 numpy array.
        ValueError: ``img`` has the wrong number of dimensions or is empty, or ``scale`` is no positive integer.
    """
    if not isinstance(img, np.ndarray) or img.dtype != np.uint8:
        raise TypeError(f'imresize_bicubic needs a uint8 numpy array, got {getattr(img, "dtype", type(img).__name__)}.')
    if img.ndim not in (2, 3) or 0 in img.shape:
        raise ValueError(f'imresize_bicubic needs a non-empty (H, W) or (H, W, C) image, got shape {img.shape}.')
    if scale != int(scale) or scale < 1:
        raise ValueError(f'scale must be a positive integer, got {scale}.')
    scale = int(scale)
    rows_done = _resize_rows(img, scale, up)
    columns_first = np.ascontiguousarray(rows_done.swapaxes(0, 1))
    return np.ascontiguousarray(_resize_rows(columns_first, scale, up).swapaxes(0, 1))


def modcrop(img: np.ndarray, scale: int) -> np.ndarray:
    """Cut rows at the bottom and columns at the right so that H and W are multiples of ``scale`` (a view)."""
    height, width = img.shape[:2]
    return img[: height - height % scale, : width - width % scale]
