"""Which kinds of files are pictures here, by name."""

import os
from pathlib import Path

from ppsr.errors import DataError, UserError

__all__ = ['FORMATS', 'IMAGE_SUFFIXES', 'MAX_SIDE', 'format_of', 'list_images']

IMAGE_SUFFIXES = frozenset({'.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm'})
FORMATS = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG', '.webp': 'WEBP', '.tif': 'TIFF', '.tiff': 'TIFF'}
MAX_SIDE = {'JPEG': 65_535, 'WEBP': 16_383, 'PNG': 2**31 - 1, 'TIFF': 2**31 - 1}


def format_of(path: str | os.PathLike) -> str:
    """'PNG', 'JPEG', 'WEBP' or 'TIFF', from the file name's extension; UserError for any other."""
    try:
        return FORMATS[Path(path).suffix.lower()]
    except KeyError:
        raise UserError(f'{path}: cannot write that kind of file; use one of {", ".join(FORMATS)}.') from None


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
