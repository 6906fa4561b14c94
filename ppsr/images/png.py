"""PNG (W3C recommendation): chunk by chunk.

Read: only the chunks that make the picture are handed to a decoder. So text of any length, which others write into
pictures by the megabyte, is never looked at, and a transparent colour is compared at the depth that it has.

Written row by row: libraries want the whole picture, and few write 16-bit gray with alpha.
"""

import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import imagecodecs
import numpy as np
from PIL import Image

from ppsr.images.arrays import turn
from ppsr.images.picture import ORIENTATION, Header, Picture, check_size, orientation_of, plausible_dpi

__all__ = ['COLOUR_CHUNKS', 'chunk', 'header', 'read', 'write_png_bands']

SIGNATURE = b'\x89PNG\r\n\x1a\n'
COLOUR_CHUNKS = (b'cICP', b'mDCV', b'cLLI', b'sRGB', b'gAMA', b'cHRM')  # they go before the pixels
MODES = {0: 'L', 2: 'RGB', 3: 'P', 4: 'LA', 6: 'RGBA'}
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
MAX_PROFILE = 2**24  # bytes of an ICC profile; those of printers have 1 to 4 MB


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """(name, position of the contents, their length) of every chunk, up to IEND or the end of the file."""
    position = len(SIGNATURE)
    while True:
        file.seek(position)
        head = file.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack('>I4s', head)
        yield kind, position + 8, length
        if kind == b'IEND':
            return
        position += 12 + length


def _whole(file: BinaryIO, kind: bytes, position: int, length: int) -> bytes | None:
    """A chunk's contents; None if they are cut off or their checksum is wrong."""
    file.seek(position)
    data, crc = file.read(length), file.read(4)
    return data if crc == struct.pack('>I', zlib.crc32(kind + data)) else None


def _size(file: BinaryIO, name: str) -> tuple[int, int, int, int]:
    """(width, height, bits, kind of colour) of the first chunk."""
    file.seek(len(SIGNATURE))
    length, kind, width, height, bits, colour = struct.unpack('>I4sIIBB', file.read(18))
    if kind != b'IHDR' or length != 13 or colour not in MODES or bits not in (1, 2, 4, 8, 16):
        raise ValueError('its header is damaged')
    check_size(name, width, height, SAMPLES[colour], bits)
    return width, height, bits, colour


def _orientation(exif: bytes | None) -> int:
    if not exif:
        return 1
    try:
        tags = Image.Exif()
        tags.load(b'Exif\0\0' + exif.removeprefix(b'Exif\0\0'))
        return orientation_of(tags.get(ORIENTATION, 1))
    except Exception:  # Pillow raises anything on broken EXIF, which breaks no picture
        return 1


def header(file: BinaryIO, name: str) -> Header:
    width, height, bits, colour = _size(file, name)
    exif, transparent = None, False
    for kind, position, length in _chunks(file):
        transparent |= kind == b'tRNS'
        if kind == b'eXIf':
            exif = _whole(file, kind, position, min(length, 2**20))
    mode = '1' if (colour, bits) == (0, 1) else MODES[colour]
    if transparent:
        mode = {'1': 'LA', 'L': 'LA', 'RGB': 'RGBA'}.get(mode, mode)
    return Header(width, height, mode, bits, _orientation(exif))


def read(file: BinaryIO, name: str) -> Picture:
    width, height, bits, colour = _size(file, name)
    needed, found, frames = [SIGNATURE], {}, 1
    for kind, position, length in _chunks(file):
        if kind in (b'IHDR', b'PLTE', b'IDAT', b'IEND') or (kind == b'tRNS' and colour == 3):
            file.seek(position - 8)
            needed.append(file.read(length + 12))
        elif kind == b'acTL':
            frames = int.from_bytes((_whole(file, kind, position, length) or b'')[:4], 'big')
        elif kind in (*COLOUR_CHUNKS, b'tRNS', b'iCCP', b'pHYs', b'eXIf') and length <= MAX_PROFILE:
            data = _whole(file, kind, position, length)
            if data is not None:
                found.setdefault(kind, data)
    notes = (f'first of {frames} frames',) if frames > 1 else ()
    if bits == 16:
        pixels = imagecodecs.png_decode(b''.join(needed))
    else:
        with Image.open(io.BytesIO(b''.join(needed)), formats=['PNG']) as image:
            image.load()
            if colour == 3:
                image = image.convert('RGBA' if 'transparency' in image.info else 'RGB')
            elif bits == 1:
                image = image.convert('L')
            pixels = np.asarray(image)
    pixels = pixels.reshape(height, width, -1)
    if colour in (0, 2) and b'tRNS' in found:
        pixels = _with_transparent_colour(pixels, found[b'tRNS'], bits)
    icc = None
    if b'iCCP' in found:
        icc = _profile(found[b'iCCP'])
        notes += () if icc else ('its colour profile is damaged or too large and dropped',)
    colours = tuple((kind, found[kind]) for kind in COLOUR_CHUNKS if kind in found)
    return Picture(turn(pixels, _orientation(found.get(b'eXIf'))), icc, _dpi(found.get(b'pHYs')), notes, colours)


def _with_transparent_colour(pixels: np.ndarray, colour: bytes, bits: int) -> np.ndarray:
    """Append alpha: 0 where a pixel has exactly this colour, whose samples have the file's depth."""
    channels, peak = pixels.shape[2], np.iinfo(pixels.dtype).max
    if len(colour) < 2 * channels:
        return pixels
    samples = np.frombuffer(colour, '>u2', channels) & (2**bits - 1)
    samples = (samples.astype(np.int64) * peak // (2**bits - 1)).astype(pixels.dtype)  # 1, 2, 4 bits divide 8
    alpha = np.where((pixels == samples).all(axis=2, keepdims=True), 0, peak).astype(pixels.dtype)
    return np.concatenate([pixels, alpha], axis=2)


def _profile(data: bytes) -> bytes | None:
    """The ICC profile in the contents of an iCCP chunk: a name, a zero, the method, deflated bytes."""
    try:
        inflate = zlib.decompressobj()
        profile = inflate.decompress(data[data.index(b'\0') + 2 :], MAX_PROFILE)
    except (ValueError, zlib.error):
        return None
    return profile if profile and inflate.eof else None


def _dpi(data: bytes | None) -> tuple[float, float] | None:
    if data is None or len(data) != 9 or data[8] != 1:  # 1: per metre
        return None
    return plausible_dpi(value * 0.0254 for value in struct.unpack('>II', data[:8]))


# ---------------------------------------------------------------------------------------------------------- writing


def write_png_bands(
    file: BinaryIO,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    bands: Iterable[np.ndarray],
    icc: bytes | None = None,
    dpi: tuple[float, float] | None = None,
    colour: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Write (rows, W, C) bands of uint8 or uint16, from the top down, as one PNG of shape (H, W, C)."""
    height, width, channels = shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    file.write(SIGNATURE)
    chunk(file, b'IHDR', struct.pack('>IIBBBBB', width, height, 8 * dtype.itemsize, colour_type, 0, 0, 0))
    for kind, data in colour:
        if not (icc and kind == b'sRGB'):  # a file has one of the two
            chunk(file, kind, data)
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
