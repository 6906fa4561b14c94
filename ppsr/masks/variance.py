"""Flatness itself: a pixel may skip where its neighbourhood hardly varies, whatever its colour."""

import torch.nn.functional as F
from torch import Tensor

from ppsr.masks.base import PixelMask, register_mask, require_threshold
from ppsr.masks.pure_pass import PIXEL_STEPS, as_integers

__all__ = ['Variance', 'local_variance', 'variance_mask']

WINDOW = 5


def local_variance(lq: Tensor, window_size: int = WINDOW) -> Tensor:
    """Variance in the w×w neighbourhood of each pixel, summed over the channels; at the edges of the image the edge
    pixel is repeated.

    Args:
        lq: (B, 3, H, W) RGB in [0, 1], any float dtype; clamped and rounded to 1/65535 as for the colour mask.
        window_size: w, odd.

    Returns:
        (B, H, W) float64, w⁴·65535² times the variance: integers, so that every sum is exact, in any order, on any
        device (below 2⁵³ up to w = 9).

    Raises:
        ValueError: a window that is even or too large, or a tensor of another shape.
    """
    if window_size % 2 != 1 or not 1 <= window_size <= 9:
        raise ValueError(f'window_size must be 1, 3, 5, 7 or 9, got {window_size}')
    pixels, reach = as_integers(lq), window_size // 2
    if 0 in lq.shape:
        return pixels.new_zeros(lq.shape[0], *lq.shape[2:])
    pixels = F.pad(pixels, (reach, reach, reach, reach), mode='replicate')
    total, squares = (F.avg_pool2d(x, window_size, 1, divisor_override=1) for x in (pixels, pixels * pixels))
    return (window_size**2 * squares - total * total).sum(1)  # n Σx² − (Σx)²


def variance_mask(lq: Tensor, threshold: float = 0.07, window_size: int = WINDOW) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1] -> (B, H, W) bool, True where the local variance is below threshold²."""
    return local_variance(lq, window_size) < (window_size**2 * PIXEL_STEPS * threshold) ** 2


@register_mask('variance')
class Variance(PixelMask):
    """Exempts the pixels around which the image is flat: sum over the channels of the local variance < threshold².

    On flat brightness attention has least to find; one class of colour, the paper's criterion, may still hold texture.

    Args:
        threshold: of the standard deviation, for values in [0, 1]. The higher, the more is exempt, nested.
        window_size: side of the neighbourhood, odd. At the edges of the image the edge pixel is repeated.

    Shape: (B, 3, H, W) RGB in [0, 1], any float dtype -> (B, H, W) bool. The same on every device.

    Raises:
        ValueError: a setting out of range (on construction), a tensor of another shape (on call).
    """

    def __init__(self, threshold: float = 0.07, window_size: int = WINDOW):
        super().__init__()
        if window_size not in (1, 3, 5, 7, 9):
            raise ValueError(f'window_size must be 1, 3, 5, 7 or 9, got {window_size!r}')
        self.threshold, self.window_size = require_threshold(threshold), window_size
        self.period = window_size  # any number of rows that is at least the reach

    def forward(self, lq: Tensor) -> Tensor:
        return variance_mask(lq, self.threshold, self.window_size)

    def with_threshold(self, threshold: float) -> 'Variance':
        return Variance(threshold, self.window_size)

    def macs(self, height: int, width: int) -> int:
        """Two sums over the window and two squares, per pixel and channel."""
        return height * width * 3 * (2 * self.window_size**2 + 2)

    def extra_repr(self) -> str:
        return f'threshold={self.threshold}, window_size={self.window_size}'
