"""Which kinds of files are pictures here: one list, by which they are recognised, opened by name and written.

A file is what its first bytes say, whatever its name is, and it is handed to the reader of that format alone. So no
other of Pillow's plug-ins (some start programs, as the one for PostScript starts Ghostscript) ever sees it.
"""

import logging
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ppsr.errors import DataError, UserError

__all__ = ['FORMATS', 'IMAGE_SUFFIXES', 'MAX_SIDE', 'READABLE', 'format_of', 'is_special', 'list_images', 'recognise']

logger = logging.getLogger('ppsr')


@dataclass(frozen=True)
class Format:
    """A kind of file that is read: its name (Pillow's, where Pillow reads it), names' endings, and first bytes."""

    name: str
    suffixes: tuple[str, ...]
    magic: re.Pattern


def _format(name: str, suffixes: str, magic: bytes) -> Format:
    return Format(name, tuple(suffixes.split()), re.compile(magic, re.DOTALL))


READABLE = (
    _format('PNG', '.png .apng', rb'\x89PNG\r\n\x1a\n'),
    _format('JPEG', '.jpg .jpeg .jpe .jfif', rb'\xff\xd8\xff'),
    _format('TIFF', '.tif .tiff', rb'II[*+]\0|MM\0[*+]'),
    _format('WEBP', '.webp', rb'RIFF....WEBP'),
    _format('BMP', '.bmp .dib', rb'BM'),
    _format('GIF', '.gif', rb'GIF8[79]a'),
    _format('AVIF', '.avif .avifs', rb'....ftyp(avif|avis|mif1|msf1)'),
    _format('JPEG2000', '.jp2 .j2k .jpx .jpf .j2c', rb'\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51'),
    _format('PNM', '.ppm .pgm .pbm .pnm .pam .pfm', rb'P[1-7Ff]\s'),
    # TGA has no signature: kinds of colour map and of image, and bits per pixel at their places
    _format('TGA', '.tga', rb'.[\0\1][\1-\3\x09-\x0b].{13}[\x08\x0f\x10\x18\x20]'),
)
IMAGE_SUFFIXES = frozenset(suffix for form in READABLE for suffix in form.suffixes)

# what is written: a name's ending -> format
FORMATS = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG', '.webp': 'WEBP', '.tif': 'TIFF', '.tiff': 'TIFF'}
MAX_SIDE = {'JPEG': 65_535, 'WEBP': 16_383, 'PNG': 2**31 - 1, 'TIFF': 2**31 - 1}


def recognise(file: BinaryIO, name: str) -> str:
    """The name of the format that the file's first bytes show; the file is left at its beginning.

    Raises:
        UserError: none of those that are read.
    """
    file.seek(0)
    head = file.read(32)
    file.seek(0)
    for form in READABLE:
        if form.magic.match(head):
            return form.name
    if not head:
        raise UserError(f'{name} is empty (0 bytes).')
    names = ', '.join(form.name for form in READABLE)
    raise UserError(f'{name} is not a picture that can be read ({names}); convert it to PNG first.')


def format_of(path: str | os.PathLike) -> str:
    """'PNG', 'JPEG', 'WEBP' or 'TIFF', from the file name's extension; UserError for any other."""
    try:
        return FORMATS[Path(path).suffix.lower()]
    except KeyError:
        raise UserError(f'{path}: cannot write that kind of file; use one of {", ".join(FORMATS)}.') from None


def is_special(path: str | os.PathLike) -> bool:
    """Whether this is a FIFO, a socket or a device (or a link to one): reading it might wait or go on for ever."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def list_images(folder: str | Path) -> list[str]:
    """The names of the image files in a folder, sorted; hidden files and files with other suffixes are left out.

    FIFOs, sockets and devices are passed over with a line in the log.

    Raises:
        DataError: the folder does not exist, is a file, or may not be read.
    """
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith('.') or os.path.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES:
                    continue
                if is_special(entry.path):
                    logger.warning('%s is not a regular file: passed over.', entry.path)
                else:
                    names.append(entry.name)
    except FileNotFoundError:
        raise DataError(f'Folder {folder} does not exist.') from None
    except NotADirectoryError:
        raise DataError(f'{folder} is a file, but a folder of images is expected there.') from None
    except OSError as error:
        raise DataError(f'Folder {folder} cannot be read: {error.strerror}.') from error
    return sorted(names)
