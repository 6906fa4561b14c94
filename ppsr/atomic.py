"""Files that are either whole or not there."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ['PREFIX', 'atomic_path']

PREFIX = '.ppsr-'  # of every temporary name
# what fsync says of a disk that is full or broken; anything else means that the file system has no fsync
_LOST = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file under a temporary name beside `path`; on success it is synced to disk and renamed to `path`.

    Yields the temporary path (same suffix, hidden, short whatever the length of the name). If the block raises, the
    temporary file is removed and `path` is as it was before. A file that is replaced hands on its permissions; a new
    one has those of any new file. Where the file system knows neither permissions nor syncing, the file is written all
    the same.

    Raises:
        OSError: as the file system says, also where `path` is no regular file; nothing is left behind.
    """
    path = Path(path)
    mode = _mode(path)
    suffix = path.suffix if len(path.suffix) < 16 else ''
    while True:
        temporary = path.with_name(f'{PREFIX}{secrets.token_hex(8)}.part{suffix}')
        try:
            os.close(
                os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else mode | stat.S_IWUSR)
            )
            break
        except FileExistsError:
            continue
    try:
        yield temporary
        with open(temporary, 'rb+') as file:
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno in _LOST:
                    raise
        if mode is not None:
            with contextlib.suppress(OSError):  # WSL's /mnt/c, SMB, S3: no permissions to set
                os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _mode(path: Path) -> int | None:
    """Permissions of the file at `path`, None where there is none; OSError where it is something else than a file."""
    try:
        found = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found):
        raise OSError(errno.EINVAL, 'it is a device or a pipe, not a file', str(path))
    return stat.S_IMODE(found)
