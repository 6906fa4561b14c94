"""Pictures in bands of rows: what happens to the network's rows before they are written, never all of them at once."""

from collections.abc import Iterable, Iterator

import cv2
import numpy as np
from PIL import Image
from torch import Tensor

from ppsr.images import LUMA

__all__ = ['BAND_ROWS', 'fill_transparent', 'resize_bands', 'split_alpha', 'to_numpy', 'with_alpha', 'working_bytes']

BAND_ROWS = 64


def split_alpha(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Colour (H, W, 1 | 3) without hidden colours, alpha (H, W) or None, and the value of white."""
    peak = np.iinfo(pixels.dtype).max if pixels.dtype.kind == 'u' else 1
    if pixels.shape[2] not in (2, 4):
        return pixels, None, peak
    alpha = pixels[..., -1]
    return fill_transparent(pixels[..., :-1], alpha), alpha, peak


def fill_transparent(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Give every fully transparent pixel the colour of the nearest visible one, so that no hidden colour bleeds in."""
    hidden = alpha == 0
    if not hidden.any() or hidden.all():
        return colour
    _, labels = cv2.distanceTransformWithLabels(
        hidden.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    rows, columns = np.nonzero(~hidden)
    nearest = np.zeros(labels.max() + 1, np.int64)
    nearest[labels[rows, columns]] = np.arange(len(rows))
    filled = colour.copy()
    index = nearest[labels[hidden]]
    filled[hidden] = colour[rows[index], columns[index]]
    return filled


def to_numpy(bands: Iterable[Tensor], gray: bool) -> Iterator[np.ndarray]:
    """(1, 3, rows, W) tensors -> (rows, W, 3) or gray (rows, W, 1) float32 arrays in [0, 1], a few rows at a time."""
    for band in bands:
        for start in range(0, band.shape[-2], BAND_ROWS):
            part = band[0, :, start : start + BAND_ROWS].clamp(0, 1).permute(1, 2, 0).float().cpu().numpy()
            yield (part @ LUMA)[..., None] if gray else part


def with_alpha(rows: Iterable[np.ndarray], alpha: np.ndarray, peak: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Append the alpha channel, enlarged bicubically (flat areas stay exactly flat, which no network promises)."""
    image, (height, width) = Image.fromarray(alpha.astype(np.float32) / peak), size
    step, row = alpha.shape[0] / height, 0
    for band in rows:
        box = (0, row * step, image.width, min((row + len(band)) * step, image.height))
        part = np.asarray(image.resize((width, len(band)), Image.Resampling.BICUBIC, box))
        row += len(band)
        yield np.concatenate([band, part[..., None]], axis=2)


def resize_bands(bands: Iterable[np.ndarray], source: tuple[int, int], target: tuple[int, int]) -> Iterator[np.ndarray]:
    """Lanczos resizing of a picture that comes in bands, as Pillow does it to a whole one.

    Args:
        bands: (rows, w, C) float32 from the top down, h rows in all.
        source, target: (h, w) and (H, W).

    Yields:
        (rows, W, C) float32, H rows in all; not clipped.
    """
    (height, width), (out_height, out_width) = source, target
    step = height / out_height
    reach = 3 * max(1.0, step) + 1  # rows that the filter looks up and down
    buffer, first, done = None, 0, 0  # `buffer` starts at source row `first`; `done` target rows are finished
    for band in bands:
        buffer = band if buffer is None else np.concatenate([buffer, band])
        ready = first + len(buffer)
        possible = out_height if ready == height else int((ready - reach) / step)
        while done < possible:
            stop = min(possible, done + BAND_ROWS)
            box = (0, done * step - first, width, min(stop * step - first, len(buffer)))
            channels = [
                Image.fromarray(np.ascontiguousarray(buffer[..., c])).resize(
                    (out_width, stop - done), Image.Resampling.LANCZOS, box
                )
                for c in range(buffer.shape[2])
            ]
            yield np.stack([np.asarray(channel) for channel in channels], axis=2)
            done = stop
        unused = max(0, int(done * step - reach) - first)
        buffer, first = buffer[unused:], first + unused


def working_bytes(shape: tuple[int, int, int], scale: int, outscale: float) -> float:
    """Bytes that all this takes at most: copies of the picture, bands of the result, rows under the filter.

    Args:
        shape: (H, W, C) of the picture.
        scale, outscale: factors of the network and of the result.
    """
    height, width, channels = shape
    bands = 12 * BAND_ROWS * max(width * scale, round(width * outscale)) * 4 * channels
    lanczos = 0
    if outscale != scale:
        lanczos = 4 * 2 * channels * width * scale * (6 * max(1, scale / outscale) + BAND_ROWS)
    return height * width * (1 + (20 if channels in (2, 4) else 0)) + bands + lanczos
