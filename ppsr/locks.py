"""Locks between processes: who writes into a folder or a file that two of them must not write into at once.

The system itself holds the lock (``flock``), so that it ends with its process however that ends: a lock file that a
killed run left behind locks nobody out. The file says who holds it, for the message of the one who comes second.
"""

import errno
import json
import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

from ppsr.errors import UserError

__all__ = ['Lock']

# what file systems without locks answer (some network mounts): like a permission that cannot be set, nothing fails
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_held: dict[int, 'Lock'] = {}  # by descriptor


class Lock:
    """An exclusive lock on a file, among all processes that lock the same path, on this host or (NFS) on others.

    A context manager; or :meth:`acquire` and :meth:`release`, where a ``with`` block does not fit. It is not handed on
    to processes that this one starts or forks. The file is made with its folder, and removed on release.

    Args:
        path: of the lock file.
        what: what it guards, as the beginning of the message: '``what`` is in use by process 7 on host a'.
    """

    def __init__(self, path: str | os.PathLike, what: str):
        self.path, self.what = Path(path), what
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock now."""
        return self._descriptor is not None

    def acquire(self) -> 'Lock':
        """Take the lock, at once or not at all.

        Raises:
            UserError: another process (or another lock of this one) holds it, or the file cannot be made.
        """
        if self.held:
            raise RuntimeError(f'{self.path} is locked by this object already')
        while True:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise UserError(
                    f'{self.path.parent} cannot be written: {error.strerror}; choose another folder.'
                ) from None
            try:
                _flock(descriptor)
            except BlockingIOError:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise UserError(
                    f'{self.what} is in use by {holder}; wait until that has ended, or stop it first.'
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            if _same_file(descriptor, self.path):
                break
            os.close(descriptor)  # its holder removed or moved the file between our opening and locking it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({'host': socket.gethostname(), 'process': os.getpid()}).encode(), 0)
        self._descriptor = descriptor
        _held[descriptor] = self
        return self

    def release(self) -> None:
        """Give the lock back and remove its file; nothing to do where it is not held."""
        if not self.held:
            return
        descriptor, self._descriptor = self._descriptor, None
        del _held[descriptor]
        try:
            if _same_file(descriptor, self.path):  # else the folder was moved, and the name may be somebody else's
                self.path.unlink(missing_ok=True)
        except OSError:
            pass  # an empty file stays; it locks nobody out
        finally:
            os.close(descriptor)

    def __enter__(self) -> 'Lock':
        return self.acquire()

    def __exit__(self, *exception) -> None:
        self.release()


def _flock(descriptor: int) -> None:
    """Lock without waiting; BlockingIOError where somebody else has it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # NFS says the first
            raise BlockingIOError(*error.args) from None
        if error.errno not in _UNSUPPORTED:
            raise


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return f'process {int(found["process"])} on {found["host"]}'
    except (OSError, ValueError, KeyError, TypeError):  # read between its locking and its writing
        return 'another process'


def _forget_after_fork() -> None:
    """A forked worker that outlives its killed parent for a moment must not keep the parent's lock."""
    for descriptor, lock in list(_held.items()):
        lock._descriptor = None
        os.close(descriptor)
    _held.clear()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_forget_after_fork)
