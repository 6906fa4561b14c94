"""AVIF and JPEG 2000 of more than 8 bits, by imagecodecs: Pillow makes 8 bits of them."""

import struct

import imagecodecs
import numpy as np
from PIL import Image

from ppsr.errors import UserError
from ppsr.images.picture import check_size, widen

__all__ = ['avif_bits', 'avif_colour', 'jp2_bits', 'read_avif', 'read_jp2']

CODESTREAM = b'\xff\x4f\xff\x51'  # start of codestream, image and tile size


def avif_bits(head: bytes) -> int:
    """Bits of a sample, from the configuration of the AV1 codec (two flags in its third byte)."""
    at = head.find(b'av1C')
    if at < 0 or at + 7 > len(head):
        return 8
    flags = head[at + 6]
    return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10


def avif_colour(head: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """Primaries and transfer (ITU-T H.273) as PNG's cICP chunk; nothing where they are sRGB's or not stated."""
    at = head.find(b'colrnclx')
    if at < 0 or at + 12 > len(head):
        return ()
    primaries, transfer = struct.unpack('>HH', head[at + 8 : at + 12])
    if (primaries in (1, 2) and transfer in (1, 2, 6, 13)) or max(primaries, transfer) > 255:
        return ()
    return ((b'cICP', bytes([primaries, transfer, 0, 1])),)


def read_avif(data: bytes, bits: int, image: Image.Image) -> np.ndarray:
    """(H, W, C) uint16, as stored, of the first frame."""
    pixels = imagecodecs.avif_decode(data, index=0)
    return widen(pixels.reshape(image.height, image.width, -1), bits)


def jp2_bits(data: bytes, name: str) -> int:
    """Bits of a sample, from the header of the codestream.

    Raises:
        UserError: signed samples, more than 16 bits, several depths, or too much of it.
    """
    at = data.find(CODESTREAM) + len(CODESTREAM)
    if at < len(CODESTREAM):
        raise ValueError('it has no codestream')
    right, bottom, left, top = struct.unpack('>4I', data[at + 4 : at + 20])
    (count,) = struct.unpack('>H', data[at + 36 : at + 38])
    depths = set(data[at + 38 : at + 38 + 3 * count : 3])
    if not depths:
        raise ValueError('it has no components')
    if max(depths) & 0x80:
        raise UserError(f'{name} has signed samples; convert it to 8 or 16 bits without a sign first.')
    bits = max(depths) + 1
    check_size(name, right - left, bottom - top, count, bits)
    if bits > 8 and (len(depths) > 1 or bits > 16 or count > 4):
        raise UserError(f'{name} has {count} samples per pixel of up to {bits} bits; convert it to 8 or 16 bits first.')
    return bits


def read_jp2(data: bytes, bits: int, image: Image.Image) -> np.ndarray:
    """(H, W, C) uint16."""
    return widen(imagecodecs.jpeg2k_decode(data).reshape(image.height, image.width, -1), bits)
