"""One image, several ways: bicubic, the network, the network with nothing exempted; in decibels, time and GMACs."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from ppsr.data.bicubic import imresize_bicubic
from ppsr.errors import UserError
from ppsr.images import as_rgb
from ppsr.metrics import psnr_ssim
from ppsr.pictures.upscaler import Stats, Upscaler

__all__ = ['Result', 'compare', 'table']


@dataclass(frozen=True)
class Result:
    """One way to enlarge the image.

    Attributes:
        name: of the way.
        image: (s·h, s·w, 3) uint8.
        psnr, ssim: on Y against the ground truth, scale pixels cropped; None without one (or if it is too small).
        stats: of the network, None for bicubic.
    """

    name: str
    image: np.ndarray
    psnr: float | None = None
    ssim: float | None = None
    stats: Stats | None = None

    @property
    def detail(self) -> str:
        """'27.31 dB / 0.8012', or '' without a ground truth."""
        if self.psnr is None:
            return ''
        return f'{self.psnr:.2f} dB' + ('' if self.ssim is None else f' / {self.ssim:.4f}')


def compare(lq: np.ndarray, upscalers: dict[str, Upscaler], gt: np.ndarray | None = None) -> list[Result]:
    """Enlarge an image by bicubic and by each network.

    Several networks are compared in time, too: each is run once before it is timed.

    Args:
        lq: (h, w, 1 to 4) uint8 or uint16.
        upscalers: name -> Upscaler, all of one scale and without another outscale.
        gt: (s·h, s·w, 1 to 4), up to s - 1 pixels larger at the bottom and right (cropped), or None.

    Raises:
        UserError: the ground truth is not one of this image at this scale.
    """
    lq = as_rgb(lq)
    scale = next(iter(upscalers.values())).scale
    height, width = lq.shape[0] * scale, lq.shape[1] * scale
    if gt is not None:
        if not (0 <= gt.shape[0] - height < scale and 0 <= gt.shape[1] - width < scale):
            raise UserError(
                f'The ground truth has {gt.shape[1]}×{gt.shape[0]} pixels, ×{scale} of the input is {width}×{height}.'
            )
        gt = as_rgb(gt)[:height, :width]
    results = [Result('Bicubic', imresize_bicubic(lq, scale, up=True))]
    for name, upscaler in upscalers.items():
        if len(upscalers) > 1:
            upscaler(lq)
        image, stats = upscaler.upscale_with_stats(lq)
        results.append(Result(name, image, stats=stats))
    if gt is None:
        return results
    return [dataclasses.replace(r, **dict(zip(('psnr', 'ssim'), psnr_ssim(r.image, gt, scale)))) for r in results]


def table(results: list[Result]) -> str:
    """The results as lines of text."""
    lines = [f'{"":24}{"PSNR":>9}{"SSIM":>9}{"GMACs":>10}{"saved":>8}{"pure":>8}{"seconds":>9}']
    for r in results:
        psnr = '-' if r.psnr is None else ('inf' if math.isinf(r.psnr) else f'{r.psnr:.3f}')
        ssim = '-' if r.ssim is None else f'{r.ssim:.4f}'
        cells = ('-', '-', '-', '-')
        if r.stats is not None:
            cells = (
                f'{r.stats.gmacs:.3f}',
                f'{r.stats.saved_share:.1%}',
                '-' if r.stats.mask is None else f'{r.stats.pure_share:.1%}',
                f'{r.stats.seconds:.2f}',
            )
        lines.append(f'{r.name:24}{psnr:>9}{ssim:>9}{cells[0]:>10}{cells[1]:>8}{cells[2]:>8}{cells[3]:>9}')
    return '\n'.join(lines)
