"""How many pixels are pure: per image and mean, without and with cross-shift mask fusion, for a grid of settings.

The masks are those of the LQ images as they are. A network that pads its input masks the padded image
(``ppsr complexity --data`` counts that), which changes the last windows at the right and at the bottom only.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ppsr.errors import UserError
from ppsr.masks import PixelMask, build_mask
from ppsr.masks.pure_pass import classify_pixels, window_mask
from ppsr.paper.report import Table

__all__ = ['Share', 'grid_table', 'image_table', 'mask_grid', 'masks_table', 'shares']


@dataclass(frozen=True)
class Share:
    """Shares of the pure pixels of one image, in [0, 1], without and with fusion."""

    plain: float
    fused: float


def shares(
    lq: Tensor, num_centers: Sequence[int] = (8,), windows: Sequence[int] = (5,), shift: int | None = None
) -> dict[tuple[int, int], Share]:
    """Shares of one image (1, 3, H, W) in [0, 1] for every pair of K in `num_centers` and w in `windows`.

    Args:
        shift: offset of the second grid; None = half the window.

    Raises:
        UserError: a setting out of range.
    """
    found = {}
    for k in num_centers:
        if k < 1:
            raise UserError(f'number of colour centres {k}: it must be at least 1.')
        labels = classify_pixels(lq, k)
        for w in windows:
            offset = w // 2 if shift is None else shift
            if w < 1 or not 0 <= offset < w:
                raise UserError(f'window {w} with shift {offset}: the window is at least 1, the shift smaller than it.')
            plain = window_mask(labels, w)
            fused = plain | window_mask(labels, w, offset)
            found[k, w] = Share(plain.double().mean().item(), fused.double().mean().item())
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def image_table(name: str, sizes: dict[str, tuple[int, int]], images: dict[str, Share], setting: str) -> Table:
    """One line per image, and the mean."""
    rows = [
        [image, f'{sizes[image][1]}×{sizes[image][0]}', 100 * share.plain, 100 * share.fused]
        for image, share in images.items()
    ]
    plain, fused = (_mean([getattr(share, kind) for share in images.values()]) for kind in ('plain', 'fused'))
    rows.append(['mean', '', 100 * plain, 100 * fused])
    header = ['image', 'LQ size', 'pure, one grid (%)', 'pure, fused (%)']
    return Table(header, rows, ['', '', '.2f', '.2f'], f'{name}, {setting}: {len(images)} images')


def grid_table(name: str, images: Sequence[dict[tuple[int, int], Share]]) -> Table:
    """Mean over the images for each setting: one line per K and w."""
    rows = []
    for k, w in images[0]:
        plain, fused = (_mean([getattr(image[k, w], kind) for image in images]) for kind in ('plain', 'fused'))
        rows.append([k, w, 100 * plain, 100 * fused, fused / plain if plain else None])
    header = ['K', 'w', 'pure, one grid (%)', 'pure, fused (%)', 'ratio']
    return Table(header, rows, ['', '', '.2f', '.2f', '.3f'], f'{name}: mean of {len(images)} images')


def mask_grid(name: str, shift: int | None = None, **settings: Sequence) -> dict[str, PixelMask]:
    """Masks of one kind for every combination of settings, under labels that say them.

    Args:
        name: a registered mask.
        shift: of its windows, where it has such; None = half the window.
        **settings: values of each setting.

    Raises:
        UserError: no such mask, a setting that it does not take, or a value that it refuses.
    """
    common = {} if shift is None else {'shift': shift}
    masks = {}
    for values in itertools.product(*settings.values()):
        changed = dict(zip(settings, values))
        label = ', '.join(f'{setting} {value:g}' for setting, value in changed.items()) or 'default'
        try:
            masks[label] = build_mask(name, **changed, **common)
        except ValueError as e:
            raise UserError(f'mask {name}: {str(e).rstrip(".")}.') from e
    return masks


def masks_table(name: str, images: Mapping[str, Mapping[str, float]], mask: str) -> Table:
    """One line per image and the mean, one column per setting of a mask."""
    labels = list(next(iter(images.values())))
    rows = [[image, *(100 * shares[label] for label in labels)] for image, shares in images.items()]
    rows.append(['mean', *(100 * _mean([shares[label] for shares in images.values()]) for label in labels)])
    header = ['image', *(f'exempt, {label} (%)' for label in labels)]
    return Table(header, rows, ['', *('.2f' for _ in labels)], f'{name}, {mask}: {len(images)} images')
