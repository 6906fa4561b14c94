"""Reading and writing of image files: one reader for preparation, training and checks, so that all agree on a pixel."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ppsr.atomic import atomic_path
from ppsr.errors import UserError

__all__ = ['IMAGE_SUFFIXES', 'DataError', 'decode_rgb', 'describe_conversion', 'image_size', 'list_images', 'write_png']

IMAGE_SUFFIXES = frozenset({'.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm'})
_EXIF_ORIENTATION = 274
_FORMATS_WITH_EXIF = frozenset({'JPEG', 'MPO', 'TIFF', 'WEBP'})


class DataError(UserError):
    """A data set, or one file in it, that cannot be used.

    torch's DataLoader raises the exception of a worker process again with that worker's traceback in the message; only
    the sentence at its end is kept.
    """

    def __init__(self, message: str):
        if message.startswith('Caught '):
            message = message.rsplit(f'{type(self).__name__}: ', 1)[-1].strip()
        super().__init__(message)


def list_images(folder: str | Path) -> list[str]:
    """The names of the image files in a folder, sorted; hidden files and files with other suffixes are left out.

    Raises:
        DataError: the folder does not exist, is a file, or may not be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if not entry.name.startswith('.') and os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES
            )
    except FileNotFoundError:
        raise DataError(f'Folder {folder} does not exist.') from None
    except NotADirectoryError:
        raise DataError(f'{folder} is a file, but a folder of images is expected there.') from None
    except OSError as error:
        raise DataError(f'Folder {folder} cannot be read: {error.strerror}.') from error


def _open(source: str | Path | bytes, where: str | Path) -> Image.Image:
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
    with _open(path, path) as image:
        width, height = image.size
        if image.format in _FORMATS_WITH_EXIF and image.getexif().get(_EXIF_ORIENTATION, 1) >= 5:
            width, height = height, width
        return height, width


def describe_conversion(path: str | Path) -> str | None:
    """What :func:`decode_rgb` has to change to make 8-bit RGB of this file, in words; None when nothing."""
    with _open(path, path) as image:
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
    with _open(source, where) as image:
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


def write_png(path: str | Path, img: np.ndarray) -> None:
    """Write a uint8 RGB (H, W, 3) array as PNG; the file is whole or not there.

    Raises:
        UserError: the disk is full or the folder may not be written.
    """
    try:
        with atomic_path(path) as temporary:
            Image.fromarray(img).save(temporary, format='PNG', compress_level=3)
    except OSError as error:
        raise UserError(f'{path} could not be written: {error.strerror or error}.') from error
