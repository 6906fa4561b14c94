"""Pure-Pass: which pixels are so flat that they may skip the expensive token mixing (arXiv 2510.01997).

Three stages, none with a learned parameter:

1. :func:`classify_pixels`: the nearest of K colour centres, uniform in hue (:func:`color_centers`);
2. :func:`window_mask`: a w×w window whose pixels all have one label is pure;
3. cross-shift mask fusion (CSMF): the union of the masks on the plain grid and on a grid shifted by half a window.

:func:`pure_mask` is all three; :class:`PurePass` holds its settings. Published: the idea of each stage. Our choice,
calibrated on the published shares: K = 8, w = 5, a diagonal shift of w // 2, border windows that are cut off by the
image edge count as windows of their own, ties go to the lowest label.
"""

import colorsys

import torch
import torch.nn.functional as F
from torch import Tensor

from ppsr.masks.base import PixelMask, register_mask

__all__ = [
    'PurePass',
    'as_integers',
    'classify_pixels',
    'color_centers',
    'fused_window_mask',
    'pure_mask',
    'window_mask',
]

SATURATION = VALUE = 0.9  # of every centre (published)
# Pixels and centres become integers of this many steps, so that float64 holds every product and sum exactly: labels are
# then the same on every device, whatever the order of its additions, and ties are real ties. 8- and 16-bit images lie
# on this grid (65535 = 257 · 255), so they lose nothing.
PIXEL_STEPS = 65535
CENTER_STEPS = 1 << 16
MAX_CENTERS = 4096  # far more than can be told apart; without a limit a number in a file takes all memory
CENTERS_AT_ONCE = 16


def _check_centers(num_centers: int) -> None:
    if not 1 <= num_centers <= MAX_CENTERS:
        raise ValueError(f'num_centers must be 1 to {MAX_CENTERS}, got {num_centers}')


def color_centers(num_centers: int = 8) -> Tensor:
    """The K fixed colour centres: hue k/K, saturation and value 0.9, as RGB.

    Returns:
        (K, 3) float64 in [0, 1].

    Raises:
        ValueError: num_centers not in [1, 4096].

    >>> color_centers(8)[0].tolist()  # red
    [0.9, 0.09, 0.09]
    """
    _check_centers(num_centers)
    rgb = [colorsys.hsv_to_rgb(k / num_centers, SATURATION, VALUE) for k in range(num_centers)]
    return torch.tensor(rgb, dtype=torch.float64, device='cpu').round(decimals=12)  # 0.09, not 0.08999999999999997


def as_integers(lq: Tensor) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1], any float dtype -> float64 integers 0…65535; values outside are clamped, NaN is 0.

    Raises:
        ValueError: lq is not (B, 3, H, W) or not floating point.
    """
    if lq.dim() != 4 or lq.shape[1] != 3 or not lq.is_floating_point():
        raise ValueError(f'lq must be (B, 3, H, W) floating point, got {lq.dtype} {tuple(lq.shape)}')
    return (lq.detach().double().nan_to_num(0.0).clamp(0, 1) * PIXEL_STEPS).round()


def classify_pixels(lq: Tensor, num_centers: int = 8) -> Tensor:
    """Label of every pixel: the nearest colour centre, argmin_k ‖p − c_k‖²; ties go to the lowest k.

    Args:
        lq: (B, 3, H, W) RGB in [0, 1], any float dtype; values outside are clamped. Rounded to 1/65535.
        num_centers: K.

    Returns:
        (B, H, W) int64 in [0, K).

    Raises:
        ValueError: lq is not (B, 3, H, W) or not floating point.

    >>> classify_pixels(torch.tensor([0.9, 0.1, 0.1]).view(1, 3, 1, 1)).item()
    0
    """
    centers = (color_centers(num_centers) * CENTER_STEPS).round().to(lq.device)  # (K, 3), integers
    pixels = as_integers(lq)
    # ‖p − c‖² = ‖p‖² − 2p·c + ‖c‖²: the largest 2p·c − ‖c‖² is the nearest centre; every number is an integer < 2⁵³
    best, labels = None, None
    for start in range(0, num_centers, CENTERS_AT_ONCE):
        some = centers[start : start + CENTERS_AT_ONCE]
        closeness = 2 * torch.einsum('kc,bchw->kbhw', some, pixels) * CENTER_STEPS
        closeness = closeness - (some.square().sum(1) * PIXEL_STEPS).view(-1, 1, 1, 1)
        if num_centers <= CENTERS_AT_ONCE:
            return closeness.argmax(0)
        nearest = closeness.argmax(0, keepdim=True)
        closest = closeness.gather(0, nearest)
        if best is None:
            best, labels = closest, nearest
        else:  # a tie stays with the lower label
            labels = torch.where(closest > best, nearest + start, labels)
            best = torch.maximum(closest, best)
    return labels[0]


def window_mask(labels: Tensor, window_size: int = 5, offset: int = 0) -> Tensor:
    """True where the w×w window around a pixel holds one label only.

    Args:
        labels: (B, H, W) integer in [0, 2²⁴).
        window_size: w.
        offset: window borders lie at offset, offset + w, … from the top and from the left; what lies before the first
            border, or is cut off by the far edge, is a window of its own. Along a side shorter than w there is one
            window, whatever the offset.

    Returns:
        (B, H, W) bool.

    Raises:
        ValueError: window_size < 1 or offset not in [0, window_size).
    """
    if window_size < 1:
        raise ValueError(f'window_size must be at least 1, got {window_size}')
    if not 0 <= offset < window_size:
        raise ValueError(f'offset must lie in [0, window_size={window_size}), got {offset}')
    h, w = labels.shape[-2:]
    if 0 in labels.shape:
        return torch.zeros_like(labels, dtype=torch.bool)
    # cells that the first window lacks, so that all windows start at multiples of w
    top = (window_size - offset) % window_size if h >= window_size else 0
    left = (window_size - offset) % window_size if w >= window_size else 0
    window = min(window_size, h), min(window_size, w)  # or a window far larger than the image would be pooled in full
    # the pad loses against every label in both pools: −inf; ceil_mode cuts the last window off in the same way
    x = F.pad(torch.stack([labels, -labels]).float(), (left, 0, top, 0), value=float('-inf'))
    highest, minus_lowest = F.max_pool2d(x.flatten(0, 1), window, window, ceil_mode=True).chunk(2)
    pure = highest == -minus_lowest
    pure = pure.repeat_interleave(window[0], -2).repeat_interleave(window[1], -1)
    return pure[:, top : top + h, left : left + w]


def pure_mask(lq: Tensor, num_centers: int = 8, window_size: int = 5, shift: int | None = None, fuse=True) -> Tensor:
    """All stages: (B, 3, H, W) RGB in [0, 1] -> (B, H, W) bool, True = pure. Arguments as in :class:`PurePass`."""
    return fused_window_mask(classify_pixels(lq, num_centers), window_size, shift, fuse)


def fused_window_mask(labels: Tensor, window_size: int = 5, shift: int | None = None, fuse: bool = True) -> Tensor:
    """:func:`window_mask` on the plain grid, united with that on the shifted one.

    (B, H, W) labels -> (B, H, W) bool.
    """
    mask = window_mask(labels, window_size)
    if fuse:
        mask = mask | window_mask(labels, window_size, window_size // 2 if shift is None else shift)
    return mask


@register_mask('colour')
class PurePass(PixelMask):
    """The mask of the paper as a module without parameters: finds the pure pixels of LQ images.

    Args:
        num_centers: K, number of colour centres.
        window_size: w, side of the windows.
        shift: offset of the second grid for CSMF; None = w // 2.
        fuse: cross-shift mask fusion on or off.

    Shape: (B, 3, H, W) RGB in [0, 1], any float dtype -> (B, H, W) bool, True = pure. The result does not depend on
    the device, nor on the other images of the batch.

    Raises:
        ValueError: a setting out of range (on construction), a tensor of another shape (on call).

    >>> lq = torch.full((1, 3, 6, 6), 0.5)
    >>> lq[..., 0, 0] = torch.tensor([1.0, 0.0, 0.0])  # a red speck
    >>> PurePass()(lq)[0].int()
    tensor([[0, 0, 1, 1, 1, 1],
            [0, 0, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 1]], dtype=torch.int32)
    """

    def __init__(self, num_centers: int = 8, window_size: int = 5, shift: int | None = None, fuse: bool = True):
        super().__init__()
        _check_centers(num_centers)
        if window_size < 1:
            raise ValueError(f'window_size must be at least 1, got {window_size}')
        if shift is not None and not 0 <= shift < window_size:
            raise ValueError(f'shift must lie in [0, window_size={window_size}), got {shift}')
        self.num_centers = num_centers
        self.window_size = window_size
        self.shift = window_size // 2 if shift is None else shift
        self.fuse = fuse
        self.period = window_size

    def forward(self, lq: Tensor) -> Tensor:
        return pure_mask(lq, self.num_centers, self.window_size, self.shift, self.fuse)

    def macs(self, height: int, width: int) -> int:
        return height * width * 3 * self.num_centers

    def tint(self, lq: Tensor) -> Tensor:
        """The colour of the centre that a pixel is nearest to."""
        centers = color_centers(self.num_centers).to(lq)
        return centers[classify_pixels(lq, self.num_centers)].permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f'num_centers={self.num_centers}, window_size={self.window_size}, shift={self.shift}, fuse={self.fuse}'
