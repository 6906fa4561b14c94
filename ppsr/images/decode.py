"""Reading pictures: what a file says about a picture is kept in a :class:`Picture`, nothing lost silently.

Pillow decodes; PNG and TIFF of 16 bits go through imagecodecs and tifffile, as Pillow has no 16-bit colour. The EXIF
orientation is applied, CMYK and Lab become sRGB, palettes become RGB or RGBA.
"""

import contextlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ppsr.errors import DataError, UserError
from ppsr.images.arrays import MODES, turn

__all__ = [
    'Picture',
    'decode_rgb',
    'describe_conversion',
    'from_pil',
    'image_size',
    'read_picture',
    'read_size',
    'to_pil',
]

ORIENTATION = 0x0112  # EXIF and TIFF tag
_FORMATS_WITH_EXIF = frozenset({'JPEG', 'MPO', 'TIFF', 'WEBP'})


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
                pixels = turn(deep, image.getexif().get(ORIENTATION, 1))
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
        return Picture(turn(values.astype(np.uint16)[..., None], orientation), icc, _dpi(image))
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
    return Picture(turn(pixels, orientation), icc, _dpi(image), notes)


def to_pil(picture: Picture) -> Image.Image:
    """A Picture as a Pillow image.

    Raises:
        UserError: 16-bit colour, which Pillow does not have.
    """
    pixels, info = picture.pixels, {}
    if pixels.dtype == np.uint16 and picture.mode != 'L':
        raise UserError(
            f'Pillow has no 16-bit {picture.mode} images; read the file with ppsr.images.read_picture and '
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
    return Picture(turn(pixels[..., : colours + has_alpha], orientation), icc, _plausible(dpi), notes)


def _unpremultiply(pixels: np.ndarray, colours: int) -> np.ndarray:
    alpha = pixels[..., colours : colours + 1].astype(np.float32)
    straight = pixels[..., :colours] * (65535 / np.maximum(alpha, 1))
    straight = np.clip(np.rint(straight), 0, 65535).astype(np.uint16)
    return np.concatenate([straight, pixels[..., colours : colours + 1]], axis=2)


def _to_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    if icc and image.mode in ('CMYK', 'LAB'):
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a broken profile: the plain formula instead
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            return ImageCms.profileToProfile(image, profile, ImageCms.createProfile('sRGB'), outputMode='RGB')
    if image.mode == 'LAB':
        lab, srgb = ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB')
        return ImageCms.profileToProfile(image, lab, srgb, outputMode='RGB')
    return image.convert('RGB')


def _open_rgb(source: str | Path | bytes, where: str | Path) -> Image.Image:
    """Open an image and read its header. The size is judged here, before memory is taken for pixels."""
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise DataError(f'{where} claims to hold more than {limit} million pixels and is refused.') from None
    except FileNotFoundError:
        raise DataError(f'{where} does not exist.') from None
    except Exception as error:  # Pillow's readers raise anything on a broken file
        raise DataError(f'{where} is not a readable image ({_reason(error)}).') from error


def _reason(error: Exception) -> str:
    text = (getattr(error, 'strerror', None) or str(error)).split('\n')[0].rstrip('.')
    return 'unknown format' if 'cannot identify' in text else text or type(error).__name__


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an image file as :func:`decode_rgb` gives it, from the header alone.

    Raises:
        DataError: the file does not exist, is no image, or is larger than Pillow's limit.
    """
    with _open_rgb(path, path) as image:
        width, height = image.size
        if image.format in _FORMATS_WITH_EXIF and image.getexif().get(ORIENTATION, 1) >= 5:
            width, height = height, width
        return height, width


def describe_conversion(path: str | Path) -> str | None:
    """What :func:`decode_rgb` has to change to make 8-bit RGB of this file, in words; None when nothing."""
    with _open_rgb(path, path) as image:
        if image.mode == 'RGB':
            return None
        kind = {
            'L': 'gray',
            'P': 'palette',
            'RGBA': 'RGBA (alpha dropped)',
            'LA': 'gray with alpha (dropped)',
            '1': 'black and white',
        }.get(image.mode, '16-bit gray' if image.mode.startswith('I') else image.mode)
        return f'{kind} -> 8-bit RGB'


def decode_rgb(source: str | Path | bytes, where: str | Path | None = None) -> np.ndarray:
    """Decode an image file, or the bytes of one, to a writable uint8 RGB array of shape (H, W, 3).

    Gray is repeated over the channels, a palette is looked up, alpha is dropped, of 16-bit samples the high byte is
    kept (as OpenCV does), and the orientation that a camera noted is applied.

    Args:
        source: a path, or the contents of an image file.
        where: how to call the image in an error message; by default the path.

    Raises:
        DataError: missing, truncated, broken, of a kind that is no picture (floating point), or larger than Pillow's
            limit (about 179 million pixels); the pixels of such an image are never allocated.
    """
    where = where or source
    with _open_rgb(source, where) as image:
        try:
            image.load()
            if image.format in _FORMATS_WITH_EXIF:
                image = ImageOps.exif_transpose(image)
            if image.mode == 'F':
                raise ValueError('floating-point samples')
            if image.mode.startswith('I'):
                samples = np.asarray(image).astype(np.int64)
                if samples.size and (samples.min() < 0 or samples.max() > 65535):
                    raise ValueError('32-bit samples')
                return np.repeat((samples >> 8).astype(np.uint8)[..., None], 3, axis=2)
            return np.array(image.convert('RGB'))
        except Exception as error:  # Pillow's decoders raise anything on a broken file
            raise DataError(f'{where} is not a readable image ({_reason(error)}).') from error
