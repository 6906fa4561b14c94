"""Test images with low-resolution versions made on the fly: HR folders in any known layout are enough."""

from pathlib import Path

import numpy as np
from torch import Tensor

from ppsr.data.bicubic import imresize_bicubic, modcrop
from ppsr.data.layout import Source, find_sources
from ppsr.errors import DataError
from ppsr.images import decode_rgb, to_tensor

__all__ = ['BENCHMARKS', 'find_images', 'read_lq', 'read_pair']

BENCHMARKS = ('Set5', 'Set14', 'BSD100', 'Urban100', 'Manga109')


def find_images(folder: str | Path, scale: int) -> dict[str, list[Source]]:
    """Data sets by name and their HR images (:func:`ppsr.data.layout.find_sources`), the benchmarks first.

    Raises:
        DataError: no such folder, or no images in it.
    """
    found = find_sources([Path(folder)], [scale])
    order = {name: place for place, name in enumerate(BENCHMARKS)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def read_pair(path: str | Path, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """(LQ, GT) of an HR image file, uint8 RGB (H, W, 3): GT cropped to a multiple of the scale, LQ its exact bicubic.

    Raises:
        DataError: not an image, or smaller than one LQ pixel.
    """
    gt = modcrop(decode_rgb(path), scale)
    if 0 in gt.shape:
        raise DataError(f'{path} is smaller than {scale}×{scale} pixels: there is no ×{scale} LR image of it.')
    return imresize_bicubic(gt, scale), gt


def read_lq(path: str | Path, scale: int | None) -> Tensor:
    """(1, 3, H, W) float32 RGB in [0, 1]: the LQ image of an HR file at this scale, or the file itself for None."""
    return to_tensor(decode_rgb(path) if scale is None else read_pair(path, scale)[0])
