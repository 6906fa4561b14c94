"""Flatness at the finest scale: a pixel may skip where it hardly differs from its four neighbours."""

from torch import Tensor

from ppsr.masks.base import PixelMask, register_mask, require_threshold
from ppsr.masks.pure_pass import PIXEL_STEPS, as_integers

__all__ = ['Gradient', 'gradient_mask', 'local_gradient']

THRESHOLD = 0.05


def local_gradient(lq: Tensor) -> Tensor:
    """Squared differences of each pixel from its four neighbours, summed over neighbours and channels; at the edges of
    the image the edge pixel is repeated.

    Args:
        lq: (B, 3, H, W) RGB in [0, 1], any float dtype; clamped and rounded to 1/65535 as for the colour mask.

    Returns:
        (B, H, W) float64, 65535² times that sum: integers below 2³⁶, so that sums are exact, in any order, on any
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
    return total


def gradient_mask(lq: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1] -> (B, H, W) bool, True where the mean over the four neighbours of the squared
    distance (Euclidean, of the colours) is below threshold²."""
    return local_gradient(lq) < 4 * (PIXEL_STEPS * threshold) ** 2


@register_mask('gradient')
class Gradient(PixelMask):
    """Exempts the pixels that hardly differ from their neighbours: root mean squared colour distance from the four of
    them below the threshold.

    What attention is missed for is detail of the size of a pixel. A slow gradient, which a variance over a window
    counts as structure, is restored as well without it; faint lines, which such a variance hardly sees, are not
    (docs/results.md compares the masks).

    Args:
        threshold: of that distance, for values in [0, 1]. The higher, the more is exempt, nested.

    Shape: (B, 3, H, W) RGB in [0, 1], any float dtype -> (B, H, W) bool. The same on every device.

    Raises:
        ValueError: a threshold out of range (on construction), a tensor of another shape (on call).
    """

    period = 1  # it sees the rows above and below

    def __init__(self, threshold: float = THRESHOLD):
        super().__init__()
        self.threshold = require_threshold(threshold)

    def forward(self, lq: Tensor) -> Tensor:
        return gradient_mask(lq, self.threshold)

    def with_threshold(self, threshold: float) -> 'Gradient':
        return Gradient(threshold)

    def macs(self, height: int, width: int) -> int:
        """Two squares, right and below, and four sums, per pixel and channel."""
        return height * width * 3 * 6

    def extra_repr(self) -> str:
        return f'threshold={self.threshold}'
