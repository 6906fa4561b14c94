"""Flatness at the finest scale: a pixel may skip where it and those around it hardly differ from their neighbours."""

import torch.nn.functional as F
from torch import Tensor

from ppsr.masks.base import PixelMask, register_mask, require_threshold
from ppsr.masks.pure_pass import PIXEL_STEPS, as_integers

__all__ = ['Gradient', 'gradient_mask', 'local_gradient']

THRESHOLD = 0.05


def local_gradient(lq: Tensor) -> Tensor:
    """Squared differences from the four neighbours, summed over neighbours and channels: those of the pixel itself and
    the mean of those in the 3×3 around it in equal parts. At the edges of the image what is at the edge is repeated.

    A pixel that happens to be like its neighbours in the middle of texture would be exempt by its own differences, and
    what is around it would suffer; by the mean alone, flat pixels beside an edge would not be.

    Args:
        lq: (B, 3, H, W) RGB in [0, 1], any float dtype; clamped and rounded to 1/65535 as for the colour mask.

    Returns:
        (B, H, W) float64, 18·65535² times that: integers below 2⁴¹, so that sums are exact, in any order, on any
        device.

    Raises:
        ValueError: a tensor of another shape.
    """
    pixels = as_integers(lq)
    total = pixels.new_zeros(lq.shape[0], *lq.shape[2:])
    across = pixels.diff(dim=-1).square_().sum(1)
    down = pixels.diff(dim=-2).square_().sum(1)
    total[..., 1:] += across
    total[..., :-1] += across
    total[:, 1:] += down
    total[:, :-1] += down
    if not total.numel():
        return total
    around = F.avg_pool2d(F.pad(total[:, None], (1, 1, 1, 1), mode='replicate'), 3, 1, divisor_override=1)[:, 0]
    return 9 * total + around


def gradient_mask(lq: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1] -> (B, H, W) bool, True where :func:`local_gradient`, for each of the four neighbours,
    is below threshold²."""
    return local_gradient(lq) < 4 * 18 * (PIXEL_STEPS * threshold) ** 2


@register_mask('gradient')
class Gradient(PixelMask):
    """Exempts the pixels that hardly differ from their neighbours: root mean squared colour distance from the four of
    them below the threshold, where the square is half the pixel's own and half the mean of the 3×3 around it.

    What attention is missed for is detail of the size of a pixel. A slow gradient, which a variance over a window
    counts as structure, is restored as well without it; faint lines, which such a variance hardly sees, are not
    (docs/results.md compares the masks).

    Args:
        threshold: of that distance, for values in [0, 1]. The higher, the more is exempt, nested.

    Shape: (B, 3, H, W) RGB in [0, 1], any float dtype -> (B, H, W) bool. The same on every device.

    Raises:
        ValueError: a threshold out of range (on construction), a tensor of another shape (on call).
    """

    period = 2  # it sees two rows above and below

    def __init__(self, threshold: float = THRESHOLD):
        super().__init__()
        self.threshold = require_threshold(threshold)

    def forward(self, lq: Tensor) -> Tensor:
        return gradient_mask(lq, self.threshold)

    def with_threshold(self, threshold: float) -> 'Gradient':
        return Gradient(threshold)

    def macs(self, height: int, width: int) -> int:
        """Per pixel and channel two squares, right and below, and four sums; per pixel nine sums and a product."""
        return height * width * (3 * 6 + 10)

    def extra_repr(self) -> str:
        return f'threshold={self.threshold}'
