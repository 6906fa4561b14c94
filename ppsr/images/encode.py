"""Writing pictures: rows come band by band (:func:`write_picture`), so that a picture larger than memory can be
written while it is made. PNG and TIFF are streamed, JPEG and WebP are collected first. A file appears under its name
only when it is complete.
"""

import contextlib
import errno
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms

from ppsr.atomic import atomic_path
from ppsr.errors import UserError
from ppsr.images.arrays import MODES, to_8_bits
from ppsr.images.formats import MAX_SIDE, format_of
from ppsr.images.picture import Picture
from ppsr.images.png import write_png_bands
from ppsr.images.tiff import write_tiff_bands

__all__ = ['atomic_file', 'check_format', 'losses', 'write_file', 'write_picture', 'write_png']

BAND_ROWS = 64  # rows that a writer handles at once


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only when the block ends well (:func:`ppsr.atomic.atomic_path`).

    Raises:
        UserError: the folder cannot be made or written to, or the disk is full; nothing is left behind then.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, open(temporary, 'wb') as file:
            yield file
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f'{path} cannot be written: the disk is full; free some space and run again.')
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f'{path} cannot be written: no permission for {path.parent.absolute()}.')
    return UserError(f'{path} cannot be written: {error.strerror or error}.')


def check_format(form: str, width: int, height: int, channels: int, name: str) -> None:
    """Refuse, before anything is computed, what a format cannot hold (UserError)."""
    if max(width, height) > MAX_SIDE[form]:
        raise UserError(
            f'{name}: {form} holds at most {MAX_SIDE[form]:,} pixels a side, this would be {width}×{height}; '
            'use --ext png or tiff.'
        )
    if form == 'JPEG' and channels in (2, 4):
        raise UserError(f'{name}: JPEG has no transparency and this picture does; use --ext png, webp or tiff.')


def losses(picture: Picture, form: str) -> tuple[str, ...]:
    """What of a picture a format cannot keep, in words; the samples of lossy formats aside."""
    lost = []
    if form in ('JPEG', 'WEBP') and picture.pixels.dtype == np.uint16:
        lost.append(f'{form} has 8 bits, the 16 of the picture are rounded')
    if form != 'PNG' and picture.colour:
        names = ', '.join(kind.decode() for kind, _ in picture.colour)
        lost.append(f'{form} cannot keep how {names} describe its colours; write PNG to keep that')
    if form == 'WEBP' and _is_gray(picture.icc):
        lost.append('WEBP has no gray, so the gray colour profile is applied (to sRGB) and not kept')
    return tuple(lost)


def _is_gray(icc: bytes | None) -> bool:
    return icc is not None and icc[16:20] == b'GRAY'


def write_picture(
    file: BinaryIO,
    form: str,
    shape: tuple[int, int, int],
    dtype,
    bands: Iterable[np.ndarray],
    icc: bytes | None = None,
    dpi: tuple[float, float] | None = None,
    quality: int = 95,
    colour: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Write a picture whose rows come in bands.

    Args:
        file: binary file open for writing.
        form: 'PNG', 'JPEG', 'WEBP' or 'TIFF'. JPEG and WebP have 8 bits: 16-bit samples are rounded for them.
        shape: (H, W, C) of the whole picture.
        dtype: uint8 or uint16.
        bands: (rows, W, C) arrays from the top down, H rows in all; each is used before the next is asked for.
        icc, dpi, colour: as in :class:`Picture`; what a format cannot keep of them, :func:`losses` says.
        quality: 1 to 100, of JPEG and WebP.

    Raises:
        UserError: the format cannot hold the picture (:func:`check_format`).
    """
    height, width, channels = shape
    check_format(form, width, height, channels, 'The picture')
    dtype, bands = np.dtype(dtype), _thin(bands)
    if form == 'PNG':
        write_png_bands(file, shape, dtype, bands, icc, dpi, colour)
    elif form == 'TIFF':
        write_tiff_bands(file, shape, dtype, bands, icc, dpi)
    else:
        _write_pillow(file, form, shape, dtype, bands, icc, dpi, quality)


def write_file(path: str | os.PathLike, pixels: np.ndarray, quality: int = 95) -> None:
    """Write (H, W, C) or (H, W) uint8 or uint16 pixels to a file whose extension says the format."""
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    form = format_of(path)
    with atomic_file(path) as file:
        write_picture(file, form, pixels.shape, pixels.dtype, [pixels], quality=quality)


def _thin(bands: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for band in bands:
        for start in range(0, len(band), BAND_ROWS):
            yield band[start : start + BAND_ROWS]


def _write_pillow(file, form, shape, dtype, bands, icc, dpi, quality) -> None:
    height, width, channels = shape
    image = Image.new('RGBA' if form == 'WEBP' and channels == 2 else MODES[channels], (width, height))
    row = 0
    for band in bands:
        if dtype == np.uint16:
            band = to_8_bits(band)
        part = Image.fromarray(band[..., 0] if channels == 1 else np.ascontiguousarray(band))
        image.paste(part.convert(image.mode), (0, row))
        row += len(band)
    if form == 'WEBP' and _is_gray(icc):
        image, icc = _gray_to_srgb(image, icc), None
    options = {'icc_profile': icc} if icc else {}
    if dpi and form == 'JPEG':
        options['dpi'] = dpi
    if form == 'JPEG' and quality >= 90:
        options['subsampling'] = 0  # 4:4:4: who asks for this quality does not want half the colour resolution
    image.save(file, form, quality=quality, **options)


def _gray_to_srgb(image: Image.Image, icc: bytes) -> Image.Image:
    """L, or RGBA of gray pixels, with a gray profile -> RGB or RGBA in sRGB; as it is if the profile is broken."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        rgb = ImageCms.profileToProfile(image.getchannel(0), profile, ImageCms.createProfile('sRGB'), outputMode='RGB')
    except (ImageCms.PyCMSError, OSError):
        return image
    if image.mode == 'RGBA':
        rgb.putalpha(image.getchannel('A'))
    return rgb


def write_png(path: str | Path, img: np.ndarray) -> None:
    """Write a uint8 RGB (H, W, 3) or gray (H, W, 1) array as PNG; twice as fast as :func:`write_file`, for many.

    Raises:
        UserError: the disk is full or the folder may not be written; no part of a file is there then.
    """
    with atomic_file(path) as file:
        Image.fromarray(img[..., 0] if img.shape[2] == 1 else img).save(file, format='PNG', compress_level=3)
