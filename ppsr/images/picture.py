"""What the readers give: a :class:`Picture`, or its :class:`Header` alone; and what they share."""

from dataclasses import dataclass

import numpy as np

from ppsr.errors import UserError
from ppsr.images.arrays import MODES

__all__ = ['MAX_PIXELS', 'Header', 'Picture', 'check_size', 'orientation_of', 'plausible_dpi', 'unpremultiply', 'widen']

MAX_PIXELS = 178_956_970  # of one picture; Pillow's own limit against decompression bombs
ORIENTATION = 0x0112  # EXIF and TIFF tag


@dataclass(frozen=True)
class Picture:
    """A picture in memory.

    Attributes:
        pixels: (H, W, C) uint8 or uint16, upright; C = 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA; alpha is not
            premultiplied. Samples of 9 to 15 bits are scaled to all of uint16.
        icc: ICC profile that belongs to the pixels, or None.
        dpi: (x, y) pixels per inch, or None.
        notes: what the reader did that the user should know, e.g. 'first of 12 frames'.
        colour: PNG's chunks about colour other than the profile (gAMA, cHRM, sRGB, cICP, …) as (name, contents).
    """

    pixels: np.ndarray
    icc: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    colour: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def mode(self) -> str:
        return MODES[self.pixels.shape[2]]


@dataclass(frozen=True)
class Header:
    """What the beginning of a file says.

    Attributes:
        width, height: in pixels, as stored.
        mode: Pillow's name of the kind of pixels ('RGB', 'P', 'CMYK', …), whatever their depth.
        bits: of a sample.
        orientation: EXIF's, 1 to 8.
    """

    width: int
    height: int
    mode: str
    bits: int = 8
    orientation: int = 1

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) of the picture when it is turned upright."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def check_size(name: str, width: int, height: int, samples: int = 4, bits: int = 16) -> None:
    """Refuse what a header promises before memory is taken for it: at most MAX_PIXELS of four samples of 16 bits.

    Raises:
        UserError: too much, or nothing.
    """
    if width < 1 or height < 1:
        raise UserError(f'{name} has no pixels ({width}×{height}).')
    if width * height > MAX_PIXELS or width * height * samples * bits > MAX_PIXELS * 64:
        raise UserError(
            f'{name} is too large to be opened safely: its header promises {width}×{height} pixels of {samples} × '
            f'{bits} bits, and at most {MAX_PIXELS // 10**6} million of 4 × 16 bits are read; cut it into parts.'
        )


def orientation_of(value) -> int:
    """EXIF's orientation as a number of 1 to 8, from whatever type of number a file has it in; 1 for anything else."""
    if isinstance(value, (tuple, bytes)) and value:  # BYTE instead of SHORT, or several numbers
        value = value[0]
    return int(value) if isinstance(value, (int, float)) and value in range(1, 9) else 1


def plausible_dpi(dpi) -> tuple[float, float] | None:
    """A pair of numbers that can be a resolution, else None."""
    try:
        x, y = (float(value) for value in dpi)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 1 <= x < 1e6 and 1 <= y < 1e6 else None


def widen(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Samples of `bits` bits scaled to all of uint8 (up to 8 bits) or uint16, rounded: 2**bits - 1 becomes the peak."""
    return stretch(pixels, 2**bits - 1)


def stretch(pixels: np.ndarray, most: int) -> np.ndarray:
    """Samples of 0 to `most` (what is above counts as `most`) scaled to all of uint8 (most < 256) or uint16."""
    dtype = np.dtype(np.uint8 if most < 256 else np.uint16)
    peak = np.iinfo(dtype).max
    largest = int(np.iinfo(pixels.dtype).max)
    if most == largest:
        return pixels.astype(dtype, copy=False)
    table = (np.arange(largest + 1, dtype=np.uint64).clip(max=most) * peak + most // 2) // most
    return table.astype(dtype)[pixels]


def unpremultiply(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) with premultiplied alpha last -> the same, not premultiplied."""
    peak = np.iinfo(pixels.dtype).max
    alpha = pixels[..., -1:].astype(np.float32)
    straight = np.clip(np.rint(pixels[..., :-1] * (peak / np.maximum(alpha, 1))), 0, peak)
    return np.concatenate([straight.astype(pixels.dtype), pixels[..., -1:]], axis=2)
