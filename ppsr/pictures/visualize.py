"""Pictures about Pure-Pass: the mask over an image, and a comparison as one would put on a slide."""

import math
from dataclasses import dataclass

import numpy as np
from matplotlib import font_manager, style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ppsr.errors import UserError
from ppsr.images import LUMA, as_rgb, to_tensor
from ppsr.masks import PixelMask, PurePass

__all__ = ['Panel', 'comparison', 'difference', 'enlarge_nearest', 'mask_overlay', 'network_mask', 'panels']

CJK_FONTS = ('Noto Sans CJK JP', 'Noto Sans CJK SC', 'Source Han Sans', 'WenQuanYi Zen Hei', 'IPAexGothic', 'MS Gothic')
TINT = 0.55  # share of the mask's colour in a pure pixel
BAND_ROWS = 256  # labels are computed in float64 for K centres at once: a band at a time


def network_mask(rgb: np.ndarray, mask: PixelMask, multiple: int) -> np.ndarray:
    """The mask that a network uses for an image, which it pads first, without the network.

    Args:
        rgb: (H, W, 3) uint8.
        mask: that of the network.
        multiple: what the network pads both sides to (:class:`ppsr.archs.MaskedNetwork`).

    Returns:
        (H, W) bool, True = pure.
    """
    height, width = rgb.shape[:2]
    rgb = np.pad(rgb, ((0, -height % multiple), (0, -width % multiple), (0, 0)), mode='symmetric')
    pure = np.empty(rgb.shape[:2], bool)
    w = mask.period or len(rgb)
    step = max(BAND_ROWS // w, 1) * w
    for top in range(0, len(rgb), step):
        # one more row of windows on either side: there the grids are cut where those of the whole image are not
        first = max(0, top - w)
        band = mask(to_tensor(rgb[first : top + step + w]))[0].numpy()
        pure[top : top + step] = band[top - first :][:step]
    return pure[:height, :width]


def mask_overlay(pixels: np.ndarray, pure: np.ndarray, mask: PixelMask | None = None) -> np.ndarray:
    """The image with its pure pixels tinted as the mask says (:meth:`PixelMask.tint`); the others gray and darker.

    Args:
        pixels: (H, W, C) uint8 or uint16, C = 1 to 4.
        pure: (H, W) bool.
        mask: that found them; None: the paper's.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: the mask is not one of this image.
    """
    if pixels.shape[:2] != pure.shape:
        raise UserError(f'The mask is {pure.shape}, the image {pixels.shape[:2]}.')
    mask = PurePass() if mask is None else mask
    result = np.empty((*pure.shape, 3), np.uint8)
    for top in range(0, pure.shape[0], BAND_ROWS):
        rows = slice(top, top + BAND_ROWS)
        rgb = as_rgb(pixels[rows])
        gray = rgb.astype(np.float32) @ LUMA
        tint = mask.tint(to_tensor(rgb))[0].permute(1, 2, 0).numpy() * 255
        # the tint keeps the brightness of the image, so that its shapes stay recognisable
        tinted = (1 - TINT) * gray[..., None] + TINT * tint
        result[rows] = np.rint(np.where(pure[rows, :, None], tinted, 0.6 * gray[..., None]))
    return result


def enlarge_nearest(rgb: np.ndarray, factor: int) -> np.ndarray:
    """Every pixel as factor×factor pixels."""
    return rgb.repeat(factor, 0).repeat(factor, 1)


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a − b|, the mean over the channels: two (H, W, 3) uint8 -> (H, W) float32 in gray levels."""
    return np.abs(a.astype(np.float32) - b.astype(np.float32)).mean(2)


@dataclass(frozen=True)
class Panel:
    """One picture of a comparison.

    Attributes:
        image: (H, W, 3) uint8, or (H, W) float: a map of gray levels that gets a colour bar.
        title: first line of the caption.
        detail: second line, may be empty.
    """

    image: np.ndarray
    title: str
    detail: str = ''


def comparison(
    lq: np.ndarray,
    bicubic: np.ndarray,
    sr: np.ndarray,
    pure: np.ndarray | None,
    mask: PixelMask | None = None,
    gt: np.ndarray | None = None,
    name: str = 'PP-ATD-light',
    details: dict[str, str] | None = None,
    crop: tuple[int, int, int, int] | None = None,
) -> list[Panel]:
    """The panels of a comparison: input, bicubic, ours, (ground truth,) difference, mask.

    Args:
        lq: (h, w, 3) uint8.
        bicubic, sr, gt: (s·h, s·w, 3) uint8.
        pure: (h, w) bool, or None: no mask panel.
        mask: that found them; None: the paper's.
        name: of the network.
        details: second lines by panel: 'bicubic', 'sr'.
        crop: (x, y, width, height) in input pixels; shows this part only. Figures in `details` stay what they are.
    """
    details, scale = details or {}, sr.shape[0] // lq.shape[0]
    reference, what = (bicubic, 'bicubic') if gt is None else (gt, 'ground truth')
    result = [
        Panel(enlarge_nearest(lq, scale), 'Input', f'{lq.shape[1]}×{lq.shape[0]} pixels'),
        Panel(bicubic, 'Bicubic', details.get('bicubic', '')),
        Panel(sr, name, details.get('sr', '')),
        Panel(difference(sr, reference), 'Difference', f'|{name} − {what}|'),
    ]
    if gt is not None:
        result.insert(3, Panel(gt, 'Ground truth', f'{gt.shape[1]}×{gt.shape[0]} pixels'))
    if pure is not None:
        overlay = enlarge_nearest(mask_overlay(lq, pure, mask), scale)
        result.append(Panel(overlay, 'Pure pixels', f'{pure.mean():.1%} of the input, tinted by label'))
    if crop is None:
        return result
    x, y, width, height = (value * scale for value in crop)
    return [Panel(p.image[y : y + height, x : x + width], p.title, p.detail) for p in result]


def panels(pictures: list[Panel], title: str = '', columns: int = 3, width: float = 16.0) -> np.ndarray:
    """Draw panels with captions in a grid.

    Args:
        pictures: all of one size.
        title: above all.
        columns: of the grid.
        width: of the figure in inches, at 120 pixels per inch.

    Returns:
        (H, W, 3) uint8.
    """
    with style.context('default'):  # not the user's own settings of matplotlib: they may change every picture
        return _draw(pictures, title, columns, width)


def _draw(pictures: list[Panel], title: str, columns: int, width: float) -> np.ndarray:
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    height, breadth = pictures[0].image.shape[:2]
    aspect = min(max(height / breadth, 0.2), 3.0)  # of a panel: an extreme panorama gets room for its caption
    panel_width = width / columns
    caption_height = 0.75  # inches
    figure = Figure(
        figsize=(width, rows * (panel_width * aspect + caption_height) + 0.5 + (0.5 if title else 0)), dpi=120
    )
    FigureCanvasAgg(figure)
    figure.set_layout_engine('constrained', h_pad=0.06, w_pad=0.06)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    if title:
        figure.suptitle(**_caption(title), fontsize=18)
    for axis in axes:
        axis.set_axis_off()
    for axis, panel in zip(axes, pictures):
        if panel.image.ndim == 2:
            shown = axis.imshow(
                panel.image, cmap='magma', vmin=0, vmax=max(1.0, float(np.percentile(panel.image, 99.5)))
            )
            # inside of the panel's own axes: beside or below it would move the panel out of line with the others
            inch = 1 / (panel_width * height / breadth)
            place = axis.inset_axes((0, -0.2 * inch, 1, 0.13 * inch))
            bar = figure.colorbar(shown, cax=place, orientation='horizontal', extend='max')
            bar.set_label('gray levels (of 255)', fontsize=12)
            place.tick_params(labelsize=11)
        else:
            axis.imshow(panel.image, interpolation='antialiased')
        caption = _caption(panel.title, panel.detail)
        axis.set_title(caption.pop('t'), **caption, fontsize=15)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _caption(*lines: str) -> dict:
    """Arguments for a text that may hold any file name: `$` is no mathematics, signs that no font has are replaced."""
    known = {entry.name for entry in font_manager.fontManager.ttflist}
    fonts = ['DejaVu Sans', *(font for font in CJK_FONTS if font in known)]
    signs = set().union(*(font_manager.get_font(font_manager.findfont(font)).get_charmap() for font in fonts))
    text = '\n'.join(''.join(s if ord(s) in signs else '\ufffd' for s in line) for line in lines if line)
    return {'t': text, 'parse_math': False, 'fontfamily': fonts}
