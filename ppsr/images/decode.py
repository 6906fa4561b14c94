"""Reading pictures: one decoder for enlarging and for data sets. What a file says is kept in a :class:`Picture`.

The first bytes say the format (:mod:`ppsr.images.formats`), and the file is handed to the reader of that format alone.
Before memory is taken for pixels, what the header promises is multiplied out (:func:`check_size`). The EXIF orientation
is applied, CMYK and Lab become sRGB, palettes become RGB or RGBA, samples of 9 to 15 bits are scaled to 16 bits.
"""

import contextlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from PIL import GifImagePlugin, Image, ImageCms, ImageFile, TiffImagePlugin, UnidentifiedImageError

from ppsr.errors import DataError, UserError
from ppsr.images import deep, png, pnm, tiff
from ppsr.images.arrays import to_8_bits, turn
from ppsr.images.formats import recognise
from ppsr.images.picture import MAX_PIXELS, ORIENTATION, Header, Picture, check_size, orientation_of, plausible_dpi

__all__ = [
    'decode_rgb',
    'describe_conversion',
    'from_pil',
    'image_size',
    'read_header',
    'read_picture',
    'to_pil',
]

MAX_STREAM = 8 * MAX_PIXELS  # bytes of a pipe or standard input: no picture that is read takes more
HEAD = 2**16  # bytes in which AVIF has its properties
OWN = {'PNG': png, 'PNM': pnm, 'TIFF': tiff}  # the readers that are not Pillow's


def read_picture(
    source: str | os.PathLike | BinaryIO | bytes,
    name: str | None = None,
    before: Callable[[Header, str], None] | None = None,
) -> Picture:
    """Read a picture from a path, a binary stream, or the contents of a file.

    Args:
        source: what to read.
        name: how to call it in an error message; by default the path, or 'standard input'.
        before: called with the header and the name before pixels are decoded; what it raises is raised.

    Raises:
        UserError: there is no such file, it is not a picture, is damaged, has no pixels, promises more than is read
            (:func:`ppsr.images.picture.check_size`), or has samples that are signed, floating-point or of more than 16
            bits.
    """
    with _opened(source, name) as (file, name), _user_errors(name), _settings():
        form = recognise(file, name)
        if before is not None:
            before(_header(file, form, name), name)
            file.seek(0)
        picture = OWN[form].read(file, name) if form in OWN else None
        return picture or _read_by_pillow(file, form, name)


def read_header(source: str | os.PathLike | BinaryIO | bytes, name: str | None = None) -> Header:
    """Size, mode, depth and orientation, without decoding; raises UserError as :func:`read_picture` does.

    ``.upright`` is the (height, width) of the picture that :func:`read_picture` gives.
    """
    with _opened(source, name, stream=False) as (file, name), _user_errors(name), _settings():
        return _header(file, recognise(file, name), name)


def _header(file: BinaryIO, form: str, name: str) -> Header:
    if form in OWN:
        return OWN[form].header(file, name)
    with _pillow(file, form, name) as image:
        bits = 8
        if form == 'AVIF':
            bits = deep.avif_bits(_head(file))
        elif form == 'JPEG2000':
            bits = deep.jp2_bits(_head(file), name)
        return Header(*image.size, image.mode.split(';')[0], bits, _orientation(image))


# ----------------------------------------------------------------------------------------------------------- data sets


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) of an image file as :func:`decode_rgb` gives it, from the header alone.

    Raises:
        DataError: as for :func:`decode_rgb`.
    """
    with _data_errors():
        return read_header(path).upright


def describe_conversion(path: str | os.PathLike) -> str | None:
    """What :func:`decode_rgb` has to change to make 8-bit RGB of this file, in words; None when nothing."""
    with _data_errors():
        header = read_header(path)
    upright = ', turned upright' if header.orientation != 1 else ''
    if header.mode == 'RGB' and header.bits == 8 and not upright:
        return None
    kind = {
        'L': 'gray',
        'P': 'palette',
        'RGBA': 'RGBA (alpha dropped)',
        'LA': 'gray with alpha (dropped)',
        '1': 'black and white',
    }.get(header.mode, header.mode)
    return f'{f"{header.bits}-bit " if header.bits > 8 else ""}{kind} -> 8-bit RGB{upright}'


def decode_rgb(source: str | os.PathLike | bytes, where: str | os.PathLike | None = None) -> np.ndarray:
    """Decode an image file, or the bytes of one, to a writable uint8 RGB array of shape (H, W, 3).

    This is :func:`read_picture`, then: gray is repeated over the channels, alpha is dropped, 16 bits are rounded to 8.

    Args:
        source: a path, or the contents of an image file.
        where: how to call the image in an error message; by default the path.

    Raises:
        DataError: where :func:`read_picture` raises UserError.
    """
    with _data_errors():
        pixels = read_picture(source, None if where is None else str(where)).pixels
    if pixels.shape[2] in (2, 4):
        pixels = pixels[..., :-1]
    pixels = to_8_bits(pixels)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else np.ascontiguousarray(pixels)


@contextlib.contextmanager
def _data_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise DataError(str(error)) from error


# -------------------------------------------------------------------------------------------------------------- Pillow


def from_pil(image: Image.Image, name: str = 'the image') -> Picture:
    """A Pillow image as a Picture, turned upright by its EXIF orientation.

    Modes other than L, LA, RGB, RGBA and 16-bit gray are converted; a change of colour space is said in its notes.

    Raises:
        UserError: no pixels, or a mode (32-bit integers beyond 16 bits, floats) that cannot be kept.
    """
    check_size(name, *image.size, samples=len(image.getbands()), bits=8)
    with _user_errors(name), _settings():
        return _from_pil(image, name)


def _from_pil(image: Image.Image, name: str) -> Picture:
    dpi = plausible_dpi(image.info.get('dpi'))  # before the frame is loaded: some plugins change their info then
    image.load()
    icc, notes, mode = image.info.get('icc_profile'), (), image.mode
    orientation = _orientation(image)  # after loading: Pillow turns TIFFs itself then
    if mode.startswith('I'):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f'{name} has 32-bit samples beyond the 16-bit range; convert it to 16 bits first.')
        return Picture(turn(values.astype(np.uint16)[..., None], orientation), icc, dpi)
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
    return Picture(turn(pixels, orientation), icc, dpi, notes)


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


def _read_by_pillow(file: BinaryIO, form: str, name: str) -> Picture:
    with _pillow(file, form, name) as image:
        frames, notes, colour, pixels, bits = _frames(image), (), (), None, 8
        if form in ('AVIF', 'JPEG2000'):
            file.seek(0)
            data = file.read()
            bits = deep.avif_bits(data[:HEAD]) if form == 'AVIF' else deep.jp2_bits(data, name)
            colour = deep.avif_colour(data[:HEAD]) if form == 'AVIF' else ()
            if bits > 8:
                pixels = (deep.read_avif if form == 'AVIF' else deep.read_jp2)(data, bits, image)
            file.seek(0)
        if frames > 1:
            notes = (f'first of {frames} frames',)
        if pixels is not None:
            icc, dpi = image.info.get('icc_profile'), plausible_dpi(image.info.get('dpi'))
            return Picture(turn(pixels, _orientation(image)), icc, dpi, notes, colour)
        picture = _from_pil(image, name)
        return Picture(picture.pixels, picture.icc, picture.dpi, notes + picture.notes, colour)


def _pillow(file: BinaryIO, form: str, name: str) -> Image.Image:
    """The image opened by one of Pillow's plug-ins, which is named, and of a size that may be decoded."""
    file.seek(0)
    if form not in Image.OPEN:
        Image.init()
        if form not in Image.OPEN:
            raise UserError(f'{name}: this Pillow reads no {form}; install a newer one, or convert the file to PNG.')
    image = Image.open(file, formats=[form])
    bits = 16 if image.mode.startswith('I') else 8
    check_size(name, *image.size, samples=len(image.getbands()), bits=bits)
    return image


def _frames(image: Image.Image) -> int:
    try:
        return getattr(image, 'n_frames', 1)
    except Exception:  # frames behind the first that are damaged do not concern us
        image.seek(0)
        return 1


def _orientation(image: Image.Image) -> int:
    try:
        return orientation_of(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow raises anything on broken EXIF, which breaks no picture
        return 1


def _to_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    if icc and image.mode in ('CMYK', 'LAB'):
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a broken profile: the plain formula instead
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            return ImageCms.profileToProfile(image, profile, ImageCms.createProfile('sRGB'), outputMode='RGB')
    if image.mode == 'LAB':
        lab, srgb = ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB')
        return ImageCms.profileToProfile(image, lab, srgb, outputMode='RGB')
    return image.convert('RGB')


# --------------------------------------------------------------------------------------------------- files and errors


def _head(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(HEAD)


@contextlib.contextmanager
def _opened(source, name: str | None, stream: bool = True) -> Iterator[tuple[BinaryIO, str]]:
    """(a file that can be sought in, a name for messages); pipes are read whole, devices are refused."""
    if isinstance(source, (bytes, bytearray)):
        yield io.BytesIO(source), name or 'the image'
    elif hasattr(source, 'read'):
        yield _whole(source, name or 'standard input'), name or 'standard input'
    else:
        name = name or str(source)
        with _user_errors(name), contextlib.ExitStack() as stack:
            mode = os.stat(source).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or (stat.S_ISFIFO(mode) and stream)):
                kind = 'a pipe: its size is not known before it is read' if stat.S_ISFIFO(mode) else 'no regular file'
                raise UserError(f'{name} is {kind}; give a picture file.')
            file = stack.enter_context(open(source, 'rb'))
            yield (file if stat.S_ISREG(mode) else _whole(file, name)), name


def _whole(stream: BinaryIO, name: str) -> BinaryIO:
    data = stream.read(MAX_STREAM + 1)
    if not data:
        empty = 'Standard input is empty; pipe a picture into it.' if name == 'standard input' else f'{name} is empty.'
        raise UserError(empty)
    if len(data) > MAX_STREAM:
        raise UserError(f'{name} gives more than {MAX_STREAM >> 20} MiB, which is no picture; give a picture file.')
    return io.BytesIO(data)


@contextlib.contextmanager
def _user_errors(name: str) -> Iterator[None]:
    """What the libraries say of a bad file (they raise anything), as one UserError."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f'{name} does not exist.') from None
    except (IsADirectoryError, NotADirectoryError):
        raise UserError(f'{name} is a folder, not a picture.') from None
    except PermissionError:
        raise UserError(f'{name} cannot be read: permission denied.') from None
    except MemoryError:
        raise UserError(f'{name} does not fit into the memory that is free; close other programs.') from None
    except UnidentifiedImageError:  # would name an object of ours
        raise UserError(f'{name} is damaged or incomplete: its header cannot be read.') from None
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:  # the system's: Pillow's have no number
            raise UserError(f'{name} cannot be read: {error.strerror}.') from None
        reason = str(error).split('\n')[0].rstrip('.') or type(error).__name__
        raise UserError(f'{name} is damaged or incomplete: {reason}.') from error


_lock = threading.RLock()
_SETTINGS = (
    (Image, 'MAX_IMAGE_PIXELS', None),  # sizes are judged by check_size
    (ImageFile, 'LOAD_TRUNCATED_IMAGES', False),
    (TiffImagePlugin, 'READ_LIBTIFF', False),
    (GifImagePlugin, 'LOADING_STRATEGY', GifImagePlugin.LoadingStrategy.RGB_AFTER_FIRST),
)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Pillow as it comes, whatever the program around us has set in it; its warnings are about metadata."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        before = [(module, name, getattr(module, name)) for module, name, _ in _SETTINGS]
        try:
            for module, name, value in _SETTINGS:
                setattr(module, name, value)
            yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)
