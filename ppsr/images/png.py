"""PNG (W3C recommendation) row by row: libraries want the whole picture, and few write 16-bit gray with alpha."""

import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

__all__ = ['chunk', 'write_png_bands']


def write_png_bands(
    file: BinaryIO,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    bands: Iterable[np.ndarray],
    icc: bytes | None = None,
    dpi: tuple[float, float] | None = None,
) -> None:
    """Write (rows, W, C) bands of uint8 or uint16, from the top down, as one PNG of shape (H, W, C)."""
    height, width, channels = shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    file.write(b'\x89PNG\r\n\x1a\n')
    chunk(file, b'IHDR', struct.pack('>IIBBBBB', width, height, 8 * dtype.itemsize, colour_type, 0, 0, 0))
    if icc:
        chunk(file, b'iCCP', b'ICC profile\0\0' + zlib.compress(icc))
    if dpi:
        chunk(file, b'pHYs', struct.pack('>IIB', *(round(v / 0.0254) for v in dpi), 1))
    deflate = zlib.compressobj(6)
    above = np.zeros(width * channels * dtype.itemsize, np.uint8)
    for band in bands:
        rows = np.ascontiguousarray(band, dtype.newbyteorder('>')).view(np.uint8).reshape(len(band), -1)
        data = deflate.compress(_png_filter(rows, above, channels * dtype.itemsize).tobytes())
        above = rows[-1].copy()
        if data:
            chunk(file, b'IDAT', data)
    chunk(file, b'IDAT', deflate.flush())
    chunk(file, b'IEND', b'')


def chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data)))


def _png_filter(rows: np.ndarray, above: np.ndarray, bpp: int) -> np.ndarray:
    """Rows of bytes (n, L) and the row above them -> (n, 1 + L): per row the filter with the smallest differences."""
    up = np.concatenate([above[None], rows[:-1]])
    left, corner = (np.pad(x, ((0, 0), (bpp, 0)))[:, :-bpp] for x in (rows, up))
    a, b, c = left.astype(np.int16), up.astype(np.int16), corner.astype(np.int16)
    # Paeth: of left, up and corner the one nearest to left + up - corner
    pa, pb, pc = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    paeth = np.where((pa <= pb) & (pa <= pc), left, np.where(pb <= pc, up, corner))
    guesses = {1: left, 2: up, 3: ((a + b) >> 1).astype(np.uint8), 4: paeth}
    best, cost = np.zeros((len(rows), 1 + rows.shape[1]), np.uint8), np.full(len(rows), np.iinfo(np.int64).max)
    for number, guess in guesses.items():
        difference = rows - guess  # modulo 256
        weight = np.abs(difference.view(np.int8).astype(np.int16)).sum(1, dtype=np.int64)
        better = weight < cost
        cost[better] = weight[better]
        best[better, 0], best[better, 1:] = number, difference[better]
    return best
