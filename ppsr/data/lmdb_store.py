"""LMDBs of images, written with basicsr's tools and read safely.

The format is basicsr's: a folder ``*.lmdb`` with the LMDB itself and ``meta_info.txt``, one line
``key.png (h,w,c) level`` for each image; the key is the file name without its suffix, and may contain dots here.
"""

import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

import lmdb
from basicsr.utils.lmdb_util import LmdbMaker

from ppsr.atomic import PREFIX
from ppsr.errors import DataError, UserError
from ppsr.images import image_size

__all__ = ['build_lmdb', 'open_lmdb', 'read_lmdb', 'read_meta_info']

_META_LINE = re.compile(r'(?P<name>.+) \((?P<h>\d+),(?P<w>\d+),\d+\)(?: \d+)?')
_environments: dict[str, lmdb.Environment] = {}
_environments_lock = threading.Lock()


def read_meta_info(path: str | Path) -> dict[str, tuple[int, int]]:
    """Read ``meta_info.txt`` of an LMDB: key -> (height, width).

    Raises:
        DataError: the file is missing, empty, or not of that format.
    """
    sizes = {}
    try:
        with open(path, encoding='utf-8') as lines:
            for number, line in enumerate(lines, start=1):
                match = _META_LINE.fullmatch(line.strip())
                if not match:
                    raise DataError(f'Line {number} of {path} is not of the form "name.png (h,w,c) 1".')
                sizes[os.path.splitext(match['name'])[0]] = int(match['h']), int(match['w'])
    except FileNotFoundError:
        raise DataError(f'{path} is missing: the LMDB is incomplete; build it again with "ppsr prepare".') from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{path} cannot be read ({error}).') from error
    if not sizes:
        raise DataError(f'{path} names no images.')
    return sizes


def open_lmdb(path: str | Path) -> lmdb.Environment:
    """The read-only environment of an LMDB, one per path and process.

    lmdb from version 2 on refuses to open a path twice in one process, also in a forked child of a process that has it
    open. So it is opened once and shared: by data sets, threads and forked workers (safe for a reader without locks).
    A spawned worker opens its own.

    Raises:
        DataError: missing or broken.
    """
    key = os.path.realpath(path)
    with _environments_lock:
        if key not in _environments:
            if not os.path.isfile(os.path.join(key, 'data.mdb')):
                raise DataError(f'There is no LMDB at {path} (no data.mdb in it).')
            try:
                _environments[key] = lmdb.open(key, readonly=True, lock=False, readahead=False)
            except lmdb.Error as error:
                raise DataError(f'The LMDB {path} cannot be opened ({error}).') from error
        return _environments[key]


def _close_lmdb(path: Path) -> None:
    with _environments_lock:
        environment = _environments.pop(os.path.realpath(path), None)
        if environment is not None:
            environment.close()


def read_lmdb(path: str | Path, key: str) -> bytes:
    """The contents of the image file stored under a key.

    Raises:
        DataError: the key is missing, or the LMDB is missing or broken.
    """
    try:
        with open_lmdb(path).begin() as transaction:
            value = transaction.get(key.encode())
    except lmdb.Error as error:
        raise DataError(f'The LMDB {path} cannot be read ({error}).') from error
    if value is None:
        raise DataError(f'The LMDB {path} lacks the image {key!r}: build it again with "ppsr prepare --overwrite".')
    return value


def build_lmdb(folder: Path, names: list[str], target: Path, progress: Iterable[str] | None = None) -> None:
    """Store PNG files in an LMDB with basicsr's LmdbMaker. The LMDB appears under its name when it is complete.

    Args:
        folder: where the images lie.
        names: file names in it; the name without suffix becomes the key (ASCII only, that is basicsr's format).
        target: the folder ``*.lmdb`` to make; one that is there is replaced.
        progress: the same names wrapped in a progress bar.

    Raises:
        UserError: a name is not ASCII, or the disk is full or may not be written.
    """
    for name in names:
        if not (name.isascii() and name.isprintable()):
            raise UserError(f'{folder / name} cannot be a key of an LMDB: basicsr allows ASCII names only; rename it.')
    temporary = target.with_name(f'{PREFIX}{secrets.token_hex(8)}.part.lmdb')
    page = 4096
    size = sum(-(-(folder / name).stat().st_size // page) * page + 2 * page for name in names)
    try:
        # Twice what the pages need: lmdb reserves address space, the file grows only as it is filled. Small batches,
        # because a batch is kept in memory until it is committed.
        maker = LmdbMaker(str(temporary), map_size=2 * size + 2**26, batch=100, compress_level=3)
        try:
            for name in progress or names:
                maker.put((folder / name).read_bytes(), os.path.splitext(name)[0], (*image_size(folder / name), 3))
        finally:
            maker.close()
        if target.exists():
            _close_lmdb(target)
            shutil.rmtree(target)
        os.replace(temporary, target)
    except (OSError, lmdb.Error) as error:
        raise UserError(f'{target} could not be written: {getattr(error, "strerror", None) or error}.') from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
