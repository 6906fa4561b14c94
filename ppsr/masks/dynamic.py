"""The paper's mask with colour centres of the image's own: a few Lloyd iterations on its pixels."""

import torch
from torch import Tensor

from ppsr.masks.base import PixelMask, register_mask
from ppsr.masks.pure_pass import as_integers, color_centers, fused_window_mask

__all__ = ['Dynamic', 'cluster_pixels']

STEPS = 65535


def cluster_pixels(lq: Tensor, num_centers: int = 8, iterations: int = 4) -> tuple[Tensor, Tensor]:
    """Colour centres of each image and the nearest one of every pixel.

    Lloyd's algorithm from the paper's fixed centres: each centre moves to the rounded mean of its pixels; one without
    pixels stays where it is. Pixels, sums and centres are integers (1/65535), so the result is exact, the same on every
    device, and depends on nothing but the image.

    Args:
        lq: (B, 3, H, W) RGB in [0, 1], any float dtype.
        num_centers: K.
        iterations: of moving; 0 leaves the paper's centres.

    Returns:
        labels (B, H, W) int64 in [0, K), ties to the lowest; centres (B, K, 3) float64 in [0, 1].
    """
    pixels = as_integers(lq).flatten(2).transpose(1, 2)  # (B, N, 3)
    start = (color_centers(num_centers) * STEPS).round().to(lq.device)
    centers = start.repeat(lq.shape[0], 1, 1)
    for _ in range(iterations):
        labels = _nearest(pixels, centers)
        ones = torch.ones_like(labels)
        count = torch.zeros(centers.shape[:2], dtype=torch.int64, device=lq.device).scatter_add(1, labels, ones)
        total = torch.zeros(centers.shape, dtype=torch.int64, device=lq.device)
        total = total.scatter_add(1, labels[..., None].expand_as(pixels), pixels.long())
        mean = (2 * total + count[..., None]).div(2 * count.clamp(min=1)[..., None], rounding_mode='floor')
        centers = torch.where(count[..., None] > 0, mean.double(), centers)
    return _nearest(pixels, centers).view(lq.shape[0], *lq.shape[2:]), centers / STEPS


def _nearest(pixels: Tensor, centers: Tensor) -> Tensor:
    """(B, N, 3) and (B, K, 3), integers as float64 -> (B, N): every number here is an integer below 2⁵³"""
    closeness = 2 * pixels @ centers.transpose(1, 2) - centers.square().sum(-1)[:, None]
    return closeness.argmax(-1)


@register_mask('dynamic')
class Dynamic(PixelMask):
    """As the paper's mask, with the image's own colour centres (its authors' future work).

    Args:
        num_centers: K.
        window_size, shift, fuse: as in :class:`ppsr.PurePass`.
        iterations: of Lloyd's algorithm, at each image.

    Shape: (B, 3, H, W) RGB in [0, 1], any float dtype -> (B, H, W) bool. The same on every device; each image's mask
    depends on the whole of it.

    Raises:
        ValueError: a setting out of range (on construction), a tensor of another shape (on call).
    """

    def __init__(
        self,
        num_centers: int = 8,
        window_size: int = 5,
        shift: int | None = None,
        fuse: bool = True,
        iterations: int = 4,
    ):
        super().__init__()
        color_centers(num_centers)  # refuses what is out of range
        if not 0 <= iterations <= 100:
            raise ValueError(f'iterations must be 0 to 100, got {iterations}')
        if window_size < 1 or (shift is not None and not 0 <= shift < window_size):
            raise ValueError(
                f'window_size must be at least 1 and shift in [0, window_size), got {window_size}, {shift}'
            )
        self.num_centers, self.window_size, self.fuse, self.iterations = num_centers, window_size, fuse, iterations
        self.shift = window_size // 2 if shift is None else shift

    def forward(self, lq: Tensor) -> Tensor:
        labels, _ = cluster_pixels(lq, self.num_centers, self.iterations)
        return fused_window_mask(labels, self.window_size, self.shift, self.fuse)

    def macs(self, height: int, width: int) -> int:
        """Distances to K centres, once more than there are iterations."""
        return height * width * 3 * self.num_centers * (self.iterations + 1)

    def tint(self, lq: Tensor) -> Tensor:
        """The colour of the centre that a pixel is nearest to."""
        labels, centers = cluster_pixels(lq, self.num_centers, self.iterations)
        colours = centers.to(lq.dtype).gather(1, labels.flatten(1)[..., None].expand(-1, -1, 3))
        return colours.transpose(1, 2).reshape(lq.shape)

    def extra_repr(self) -> str:
        return (
            f'num_centers={self.num_centers}, window_size={self.window_size}, shift={self.shift}, fuse={self.fuse}, '
            f'iterations={self.iterations}'
        )
