"""Pure by colour and flat by variance."""

from torch import Tensor

from ppsr.masks.base import PixelMask, register_mask
from ppsr.masks.pure_pass import PurePass
from ppsr.masks.variance import WINDOW, Variance

__all__ = ['Both']


@register_mask('both')
class Both(PixelMask):
    """Exempts what the paper's mask finds pure, as far as it is flat, too.

    Args:
        threshold: as in :class:`ppsr.masks.variance.Variance`, whose neighbourhood is 5×5 here.
        num_centers, window_size, shift, fuse: as in :class:`ppsr.PurePass`.

    Shape: (B, 3, H, W) RGB in [0, 1], any float dtype -> (B, H, W) bool. The same on every device.

    Raises:
        ValueError: a setting out of range (on construction), a tensor of another shape (on call).
    """

    def __init__(
        self,
        threshold: float = 0.07,
        num_centers: int = 8,
        window_size: int = 5,
        shift: int | None = None,
        fuse: bool = True,
    ):
        super().__init__()
        self.of_colour = dict(num_centers=num_centers, window_size=window_size, shift=shift, fuse=fuse)
        self.colour, self.variance = PurePass(**self.of_colour), Variance(threshold)
        # the grid of the windows, as many rows of it as the neighbourhood reaches
        self.period = window_size * -(-(WINDOW // 2) // window_size)

    def forward(self, lq: Tensor) -> Tensor:
        return self.colour(lq) & self.variance(lq)

    def with_threshold(self, threshold: float) -> 'Both':
        return Both(threshold, **self.of_colour)

    def macs(self, height: int, width: int) -> int:
        return self.colour.macs(height, width) + self.variance.macs(height, width)

    def tint(self, lq: Tensor) -> Tensor:
        return self.colour.tint(lq)
