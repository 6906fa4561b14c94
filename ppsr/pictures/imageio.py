"""Reading and writing pictures: what a file says about a picture is kept in a :class:`Picture`, nothing lost silently.

Reading: Pillow decodes; PNG and TIFF of 16 bits go through imagecodecs and tifffile, as Pillow has no 16-bit colour.
The EXIF orientation is applied, CMYK and Lab become sRGB, palettes become RGB or RGBA.

Writing takes the rows band by band (:func:`write_picture`), so that a picture larger than memory can be written while
it is made: PNG and TIFF are streamed, JPEG and WebP are collected first. A file appears under its name only when it is
complete.
"""

import contextlib
import errno
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, ImageCms, UnidentifiedImageError

from ppsr.atomic import atomic_path
from ppsr.errors import UserError

__all__ = [
    'FORMATS',
    'MODES',
    'Picture',
    'atomic_file',
    'format_of',
    'from_pil',
    'read_picture',
    'read_size',
    'to_pil',
    'write_file',
    'write_picture',
]

MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}  # channels -> mode
FORMATS = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG', '.webp': 'WEBP', '.tif': 'TIFF', '.tiff': 'TIFF'}
MAX_SIDE = {'JPEG': 65_535, 'WEBP': 16_383, 'PNG': 2**31 - 1, 'TIFF': 2**31 - 1}
ORIENTATION = 0x0112  # EXIF and TIFF tag
BAND_ROWS = 64  # rows that a writer handles at once


@dataclass(frozen=True)
class Picture:
    """A picture in memory.

    Attributes:
        pixels: (H, W, C) uint8 or uint16, upright; C = 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA; alpha is not
            premultiplied.
        icc: ICC profile that belongs to the pixels, or None.
        dpi: (x, y) pixels per inch, or None.
        notes: what the reader did that the user should know, e.g. 'first of 12 frames'.
    """

    pixels: np.ndarray
    icc: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def mode(self) -> str:
        return MODES[self.pixels.shape[2]]


# ---------------------------------------------------------------------------------------------------------- reading


def read_picture(source: str | os.PathLike | BinaryIO) -> Picture:
    """Read a picture from a path or a binary stream.

    Raises:
        UserError: there is no such file, it is not a picture, is damaged, has no pixels, is too large to be true
            (Pillow's limit against decompression bombs, 179 megapixels), or has samples of neither 8 nor 16 bits.
    """
    name, data = _load(source)
    with _user_errors(name):
        with _deep_tiff(data) as tiff:
            if tiff is not None:
                return _read_deep_tiff(tiff, name)
        with _open(data) as image:
            if 0 in image.size:
                raise UserError(f'{name} has no pixels ({image.size[0]}×{image.size[1]}).')
            frames = getattr(image, 'n_frames', 1)
            notes = (f'first of {frames} frames',) if frames > 1 else ()
            dpi = _dpi(image)  # before the frame is loaded: some plugins change their info then
            deep = _decode_deep_png(data, image)
            if deep is not None:
                pixels = _turn(deep, image.getexif().get(ORIENTATION, 1))
                return Picture(pixels, image.info.get('icc_profile'), dpi, notes)
            picture = from_pil(image, name)
            return replace(picture, dpi=dpi, notes=notes + picture.notes)


def read_size(source: str | os.PathLike) -> tuple[int, int]:
    """(width, height) as stored, from the header alone; raises UserError as :func:`read_picture` does."""
    with _user_errors(str(source)):
        with _deep_tiff(source) as tiff:
            if tiff is not None:
                return tiff.pages[0].imagewidth, tiff.pages[0].imagelength
        with _open(source) as image:
            return image.size


def from_pil(image: Image.Image, name: str = 'the image') -> Picture:
    """A Pillow image as a Picture, turned upright by its EXIF orientation.

    Modes other than L, LA, RGB, RGBA and 16-bit gray are converted; a change of colour space is said in its notes.

    Raises:
        UserError: no pixels, or a mode (32-bit integers beyond 16 bits, floats) that cannot be kept.
    """
    if 0 in image.size:
        raise UserError(f'{name} has no pixels ({image.size[0]}×{image.size[1]}).')
    image.load()
    icc, notes, mode = image.info.get('icc_profile'), (), image.mode
    orientation = image.getexif().get(ORIENTATION, 1)  # after loading: Pillow turns TIFFs itself then
    if mode.startswith('I'):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f'{name} has 32-bit samples beyond the 16-bit range; convert it to 16 bits first.')
        return Picture(_turn(values.astype(np.uint16)[..., None], orientation), icc, _dpi(image))
    if mode == 'F':
        raise UserError(f'{name} has floating-point samples; convert it to 8 or 16 bits first.')
    transparent = 'transparency' in image.info or mode in ('PA', 'La', 'RGBa')
    if mode in ('CMYK', 'LAB', 'YCbCr', 'HSV'):
        image, notes, icc = _to_srgb(image, icc), (f'{mode} converted to RGB',), None
    elif mode in ('1', 'L', 'La'):
        image = image.convert('LA' if transparent else 'L')
    elif mode not in ('LA', 'RGB', 'RGBA') or transparent:  # P, PA, RGBa, RGBX, or a colour that means transparent
        image = image.convert('RGBA' if transparent else 'RGB')
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    return Picture(_turn(pixels, orientation), icc, _dpi(image), notes)


def to_pil(picture: Picture) -> Image.Image:
    """A Picture as a Pillow image.

    Raises:
        UserError: 16-bit colour, which Pillow does not have.
    """
    pixels, info = picture.pixels, {}
    if pixels.dtype == np.uint16 and picture.mode != 'L':
        raise UserError(
            f'Pillow has no 16-bit {picture.mode} images; read the file with ppsr.pictures.imageio.read_picture and '
            'pass its pixels (a uint16 array), or write to a file with Upscaler.upscale_file.'
        )
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if picture.icc:
        info['icc_profile'] = picture.icc
    if picture.dpi:
        info['dpi'] = picture.dpi
    image.info.update(info)
    return image


def _load(source) -> tuple[str, str | os.PathLike | BinaryIO]:
    """A name for messages, and something that can be opened twice."""
    if hasattr(source, 'read'):
        data = source.read()
        if not data:
            raise UserError('Standard input is empty; pipe a picture into it.')
        return 'standard input', io.BytesIO(data)
    return str(source), source


@contextlib.contextmanager
def _user_errors(name: str) -> Iterator[None]:
    """What Pillow, tifffile and imagecodecs say of a bad file, as one UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f'{name} does not exist.') from None
    except IsADirectoryError:
        raise UserError(f'{name} is a folder, not a picture.') from None
    except PermissionError:
        raise UserError(f'{name} cannot be read: permission denied.') from None
    except Image.DecompressionBombError as error:
        raise UserError(f'{name} is too large to be opened safely: {error}') from None
    except UnidentifiedImageError:
        size = os.path.getsize(name) if os.path.exists(name) else None
        raise UserError(f'{name} is {"empty (0 bytes)" if size == 0 else "not a picture that can be read"}.') from None
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error, LookupError, TypeError, ValueError) as error:
        raise UserError(f'{name} is damaged or incomplete: {error}') from None
    except RuntimeError as error:  # imagecodecs' errors of every codec are RuntimeErrors named after it
        if type(error) is RuntimeError:
            raise
        raise UserError(f'{name} is damaged or incomplete: {error}') from None


def _open(source) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # 89 to 179 megapixels: wanted here
        warnings.simplefilter('ignore', UserWarning)  # broken metadata of a picture that is whole
        return Image.open(source)


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    return _plausible(image.info.get('dpi'))


def _plausible(dpi) -> tuple[float, float] | None:
    try:
        x, y = (float(value) for value in dpi)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 1 <= x < 1e6 and 1 <= y < 1e6 else None


def _decode_deep_png(data, image: Image.Image) -> np.ndarray | None:
    """(H, W, C) uint16 of a 16-bit PNG, None for every other file."""
    if image.format != 'PNG' or 'transparency' in image.info:  # one colour as transparent is not worth 16 bits
        return None
    encoded = data.getvalue() if isinstance(data, io.BytesIO) else Path(data).read_bytes()
    if encoded[24] != 16:  # the bit depth in IHDR
        return None
    pixels = imagecodecs.png_decode(encoded)
    return pixels.reshape(pixels.shape[0], pixels.shape[1], -1)


@contextlib.contextmanager
def _deep_tiff(data) -> Iterator[tifffile.TiffFile | None]:
    """The file opened by tifffile if it is a TIFF of 16-bit integers, else None."""
    with contextlib.ExitStack() as stack:
        file = data if isinstance(data, io.BytesIO) else stack.enter_context(open(data, 'rb'))
        magic = file.read(4)
        file.seek(0)
        tiff = None
        if magic in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'):
            tiff = stack.enter_context(tifffile.TiffFile(file))
            if not tiff.pages or tiff.pages[0].dtype != np.uint16:
                tiff = None
                file.seek(0)
        yield tiff


def _read_deep_tiff(tiff: tifffile.TiffFile, name: str) -> Picture:
    page = tiff.pages[0]
    if page.imagewidth * page.imagelength > 2 * Image.MAX_IMAGE_PIXELS:
        raise UserError(f'{name} is too large to be opened safely: {page.imagewidth}×{page.imagelength} pixels.')
    kinds = tifffile.PHOTOMETRIC
    colours = {kinds.MINISBLACK: 1, kinds.MINISWHITE: 1, kinds.RGB: 3}.get(page.photometric)
    if colours is None or page.imagedepth != 1:
        raise UserError(f'{name} is a 16-bit {page.photometric.name} TIFF; convert it to gray or RGB first.')
    pixels = page.asarray()
    if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and page.samplesperpixel > 1:
        pixels = np.moveaxis(pixels, 0, -1)
    pixels = pixels.reshape(page.imagelength, page.imagewidth, -1)
    if page.photometric == kinds.MINISWHITE:
        pixels = np.concatenate([65535 - pixels[..., :1], pixels[..., 1:]], axis=2)
    extra = page.extrasamples[0] if page.extrasamples else tifffile.EXTRASAMPLE.UNSPECIFIED
    if extra == tifffile.EXTRASAMPLE.ASSOCALPHA:
        pixels = _unpremultiply(pixels, colours)
    has_alpha = extra != tifffile.EXTRASAMPLE.UNSPECIFIED
    icc, orientation = page.tags.valueof('InterColorProfile'), page.tags.valueof('Orientation', default=1)
    notes = (f'first of {len(tiff.pages)} frames',) if len(tiff.pages) > 1 else ()
    dpi = None
    if page.resolutionunit in (tifffile.RESUNIT.INCH, tifffile.RESUNIT.CENTIMETER):
        dpi = page.get_resolution(tifffile.RESUNIT.INCH)
    return Picture(_turn(pixels[..., : colours + has_alpha], orientation), icc, _plausible(dpi), notes)


def _unpremultiply(pixels: np.ndarray, colours: int) -> np.ndarray:
    alpha = pixels[..., colours : colours + 1].astype(np.float32)
    straight = pixels[..., :colours] * (65535 / np.maximum(alpha, 1))
    straight = np.clip(np.rint(straight), 0, 65535).astype(np.uint16)
    return np.concatenate([straight, pixels[..., colours : colours + 1]], axis=2)


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Upright pixels from stored ones and the EXIF orientation (1 to 8; anything else counts as 1)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return np.array(pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])  # a copy that can be written to


def _to_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    if icc and image.mode in ('CMYK', 'LAB'):
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a broken profile: the plain formula instead
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            return ImageCms.profileToProfile(image, profile, ImageCms.createProfile('sRGB'), outputMode='RGB')
    if image.mode == 'LAB':
        lab, srgb = ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB')
        return ImageCms.profileToProfile(image, lab, srgb, outputMode='RGB')
    return image.convert('RGB')


# ---------------------------------------------------------------------------------------------------------- writing


def format_of(path: str | os.PathLike) -> str:
    """'PNG', 'JPEG', 'WEBP' or 'TIFF', from the file name's extension; UserError for any other."""
    try:
        return FORMATS[Path(path).suffix.lower()]
    except KeyError:
        raise UserError(f'{path}: cannot write that kind of file; use one of {", ".join(FORMATS)}.') from None


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
        return UserError(f'{path} cannot be written: no permission for {path.parent}.')
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


def write_picture(
    file: BinaryIO,
    form: str,
    shape: tuple[int, int, int],
    dtype,
    bands: Iterable[np.ndarray],
    icc: bytes | None = None,
    dpi: tuple[float, float] | None = None,
    quality: int = 95,
) -> None:
    """Write a picture whose rows come in bands.

    Args:
        file: binary file open for writing.
        form: 'PNG', 'JPEG', 'WEBP' or 'TIFF'. JPEG and WebP have 8 bits: 16-bit samples are rounded for them.
        shape: (H, W, C) of the whole picture.
        dtype: uint8 or uint16.
        bands: (rows, W, C) arrays from the top down, H rows in all; each is used before the next is asked for.
        icc, dpi: as in :class:`Picture`.
        quality: 1 to 100, of JPEG and WebP.

    Raises:
        UserError: the format cannot hold the picture (:func:`check_format`).
    """
    height, width, channels = shape
    check_format(form, width, height, channels, 'The picture')
    writer: Callable = {'PNG': _write_png, 'TIFF': _write_tiff}.get(form, _write_pillow)
    writer(file, form, shape, np.dtype(dtype), _thin(bands), icc, dpi, quality)


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
            band = ((band.astype(np.uint32) + 128) // 257).astype(np.uint8)
        part = Image.fromarray(band[..., 0] if channels == 1 else np.ascontiguousarray(band))
        image.paste(part.convert(image.mode), (0, row))
        row += len(band)
    options = {'icc_profile': icc} if icc else {}
    if dpi and form == 'JPEG':
        options['dpi'] = dpi
    if form == 'JPEG' and quality >= 90:
        options['subsampling'] = 0  # 4:4:4: who asks for this quality does not want half the colour resolution
    image.save(file, form, quality=quality, **options)


def _write_tiff(file, form, shape, dtype, bands, icc, dpi, quality) -> None:
    height, width, channels = shape
    strips = (_tiff_strip(strip, dtype.newbyteorder('<')) for strip in _regroup(bands, BAND_ROWS))
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
            rowsperstrip=BAND_ROWS,
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


def _write_png(file, form, shape, dtype, bands, icc, dpi, quality) -> None:
    """PNG (W3C recommendation) row by row: libraries want the whole picture, and few write 16-bit gray with alpha."""
    height, width, channels = shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    file.write(b'\x89PNG\r\n\x1a\n')
    _chunk(file, b'IHDR', struct.pack('>IIBBBBB', width, height, 8 * dtype.itemsize, colour_type, 0, 0, 0))
    if icc:
        _chunk(file, b'iCCP', b'ICC profile\0\0' + zlib.compress(icc))
    if dpi:
        _chunk(file, b'pHYs', struct.pack('>IIB', *(round(v / 0.0254) for v in dpi), 1))
    deflate = zlib.compressobj(6)
    above = np.zeros(width * channels * dtype.itemsize, np.uint8)
    for band in bands:
        rows = np.ascontiguousarray(band, dtype.newbyteorder('>')).view(np.uint8).reshape(len(band), -1)
        data = deflate.compress(_png_filter(rows, above, channels * dtype.itemsize).tobytes())
        above = rows[-1].copy()
        if data:
            _chunk(file, b'IDAT', data)
    _chunk(file, b'IDAT', deflate.flush())
    _chunk(file, b'IEND', b'')


def _chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
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
