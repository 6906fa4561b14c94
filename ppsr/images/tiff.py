"""TIFF: gray and RGB of 8 to 16 bits in every layout by tifffile; palettes, bilevel, CMYK, … are left to Pillow."""

import contextlib
import logging
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import tifffile

from ppsr.errors import UserError
from ppsr.images.arrays import turn
from ppsr.images.picture import Header, Picture, check_size, orientation_of, plausible_dpi, unpremultiply, widen

__all__ = ['header', 'read', 'write_tiff_bands']

STRIP_ROWS = 64
KINDS, EXTRA = tifffile.PHOTOMETRIC, tifffile.EXTRASAMPLE
COLOURS = {KINDS.MINISBLACK: 1, KINDS.MINISWHITE: 1, KINDS.RGB: 3}  # the photometric kinds that are read here
STREAMS = {1, 5, 8, 32773, 32946, 34925, 50000}  # compressions of bytes, which cannot give more than they should
MODES = {KINDS.PALETTE: 'P', KINDS.SEPARATED: 'CMYK', KINDS.YCBCR: 'YCbCr', KINDS.CIELAB: 'LAB'}

logging.getLogger('tifffile').addHandler(logging.NullHandler())  # what is wrong is said once, by the exception


@contextlib.contextmanager
def _first_page(file: BinaryIO, name: str) -> Iterator[tifffile.TiffPage]:
    """The first page, if what it promises may be read."""
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        bits = page.bitspersample
        numbers = (page.imagewidth, page.imagelength, page.imagedepth, page.samplesperpixel, page.photometric)
        if not all(isinstance(number, int) for number in (*numbers, page.compression, bits)):
            raise ValueError('its tags have not the numbers that they should have')
        check_size(name, page.imagewidth, page.imagelength * page.imagedepth, page.samplesperpixel, bits)
        formats = page.sampleformat if isinstance(page.sampleformat, tuple) else (page.sampleformat,)
        for kind, what in ((2, 'signed'), (3, 'floating-point'), (5, 'complex'), (6, 'complex')):
            if kind in formats:
                raise UserError(f'{name} has {what} samples; convert it to 8 or 16 bits without a sign first.')
        if bits > 16:
            raise UserError(f'{name} has samples of {bits} bits; convert it to 8 or 16 bits first.')
        if bits > 8 and (page.photometric not in COLOURS or page.imagedepth != 1):
            kind = getattr(page.photometric, 'name', page.photometric)
            raise UserError(f'{name} is a {bits}-bit {kind} TIFF; convert it to gray or RGB first.')
        if bits > 8 and page.compression not in STREAMS:
            kind = getattr(page.compression, 'name', page.compression)
            raise UserError(
                f'{name} is a {bits}-bit TIFF compressed by {kind}; convert it to another compression first.'
            )
        yield page


def header(file: BinaryIO, name: str) -> Header:
    with _first_page(file, name) as page:
        colours = COLOURS.get(page.photometric, 0)
        alpha = 'A' if page.samplesperpixel > colours else ''
        mode = {1: 'L' + alpha, 3: 'RGB' + alpha}.get(colours) or MODES.get(page.photometric, 'unusual colours')
        mode = '1' if page.bitspersample == 1 and mode == 'L' else mode
        return Header(page.imagewidth, page.imagelength, mode, page.bitspersample, _orientation(page))


def _orientation(page: tifffile.TiffPage) -> int:
    return orientation_of(page.tags.valueof('Orientation', default=1))


def read(file: BinaryIO, name: str) -> Picture | None:
    """The first page, or None if it is of a kind (with at most 8 bits) that Pillow reads."""
    with _first_page(file, name) as page:
        colours, bits = COLOURS.get(page.photometric), page.bitspersample
        if colours is None or bits < 8 or page.compression not in STREAMS or page.imagedepth != 1:
            return None
        # the strongest of these compressions make one byte of 1,032 (deflate) to some thousands
        stored = sum(page.databytecounts)
        if page.nbytes > 2**24 and page.nbytes > 2**14 * stored:
            raise ValueError(f'its {stored} bytes cannot hold {page.imagewidth}×{page.imagelength} pixels')
        pixels = page.asarray()
        if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and page.samplesperpixel > 1:
            pixels = np.moveaxis(pixels.reshape(page.samplesperpixel, page.imagelength, page.imagewidth), 0, -1)
        pixels = widen(pixels.reshape(page.imagelength, page.imagewidth, -1), bits)
        if page.photometric == KINDS.MINISWHITE:
            pixels = np.concatenate([np.iinfo(pixels.dtype).max - pixels[..., :1], pixels[..., 1:]], axis=2)
        pixels, notes = _alpha(pixels, colours, tuple(page.extrasamples or ()))
        frames = _count(page.parent)
        notes = ((f'first of {frames} frames',) if frames > 1 else ()) + notes
        icc = page.tags.valueof('InterColorProfile')
        icc = bytes(icc) if isinstance(icc, (bytes, tuple)) else None
        return Picture(turn(pixels, _orientation(page)), icc, _dpi(page), notes)


def _alpha(pixels: np.ndarray, colours: int, kinds: tuple[int, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Colours and alpha out of all samples.

    Alpha is the sample that is marked so. A single further sample that is not marked is alpha as well, as OpenCV writes
    it, unless it is zero everywhere: nobody keeps a picture to hide all of it.
    """
    kinds += (EXTRA.UNSPECIFIED,) * (pixels.shape[2] - colours - len(kinds))
    colour, notes = pixels[..., :colours], ()
    if not kinds:
        return colour, ()
    marked = [i for i, kind in enumerate(kinds) if kind != EXTRA.UNSPECIFIED]
    if not marked and (len(kinds) > 1 or not pixels[..., colours].any()):
        return colour, (f'{len(kinds)} samples per pixel that are no colour dropped',)
    index = marked[0] if marked else 0
    if len(kinds) > 1:
        notes = (f'{len(kinds) - 1} samples per pixel that are no colour dropped',)
    elif not marked:
        notes = ('a sample of no stated kind taken as transparency',)
    picture = np.concatenate([colour, pixels[..., colours + index, None]], axis=2)
    return unpremultiply(picture) if kinds[index] == EXTRA.ASSOCALPHA else picture, notes


def _count(tiff: tifffile.TiffFile) -> int:
    try:
        return len(tiff.pages)
    except Exception:  # pages behind the first that are damaged do not concern us
        return 1


def _dpi(page: tifffile.TiffPage) -> tuple[float, float] | None:
    try:
        if page.resolutionunit in (tifffile.RESUNIT.INCH, tifffile.RESUNIT.CENTIMETER):
            return plausible_dpi(page.get_resolution(tifffile.RESUNIT.INCH))
    except Exception:  # tags of types that they should not have
        pass
    return None


# ---------------------------------------------------------------------------------------------------------- writing


def write_tiff_bands(
    file: BinaryIO,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    bands: Iterable[np.ndarray],
    icc: bytes | None = None,
    dpi: tuple[float, float] | None = None,
) -> None:
    """Write (rows, W, C) bands of uint8 or uint16, from the top down, as one TIFF of shape (H, W, C)."""
    height, width, channels = shape
    strips = (_tiff_strip(strip, dtype.newbyteorder('<')) for strip in _regroup(bands, STRIP_ROWS))
    extra = {2: ['UNASSALPHA'], 4: ['UNASSALPHA']}.get(channels)
    with tifffile.TiffWriter(
        file, byteorder='<', bigtiff=height * width * channels * dtype.itemsize > 2**32 - 2**25
    ) as tiff:
        tiff.write(
            strips,
            shape=shape if channels > 1 else shape[:2],
            dtype=dtype,
            photometric='RGB' if channels >= 3 else 'MINISBLACK',
            planarconfig='CONTIG' if channels > 1 else None,
            extrasamples=extra,
            rowsperstrip=STRIP_ROWS,
            compression='zlib',
            predictor=True,
            iccprofile=icc,
            resolution=dpi or (1, 1),
            resolutionunit='INCH' if dpi else 'NONE',
            metadata=None,
            software=False,
        )


def _tiff_strip(rows: np.ndarray, dtype: np.dtype) -> bytes:
    """A strip as TIFF wants it: differences to the pixel on the left (predictor 2), deflated."""
    rows = rows.astype(dtype)
    rows[:, 1:] -= rows[:, :-1].copy()
    return zlib.compress(rows.tobytes())


def _regroup(bands: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The same rows in bands of exactly `rows` (the last may have fewer)."""
    waiting: list[np.ndarray] = []
    count = 0
    for band in bands:
        while len(band):
            part = band[: rows - count].copy()  # the producer may reuse its buffer
            band = band[len(part) :]
            waiting.append(part)
            count += len(part)
            if count == rows:
                yield np.concatenate(waiting)
                waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)
