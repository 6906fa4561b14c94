"""The folder of a run: locked while it is written into, and made when nothing that can be checked can fail any more.

A run with the name of an older one puts that one's folder away under a name with the date, as BasicSR does; here it
does so last, after options, data, weights and network have been found good.
"""

import contextlib
import logging
import logging.handlers
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from basicsr.utils import get_root_logger

from ppsr.atomic import atomic_path
from ppsr.errors import UserError
from ppsr.locks import Lock
from ppsr.training.distributed import from_first

__all__ = ['RunLog', 'archive', 'keep_options', 'locked', 'make_fresh', 'read_text']

HELD_RECORDS = 100_000  # log lines kept in memory until there is a file for them


@contextlib.contextmanager
def locked(folder: str | Path, what: str) -> Iterator[None]:
    """One run at a time in `folder`. The lock lies beside it, so that it stays where it is when the folder is archived.

    Raises:
        UserError: another run is in it; in all processes of this one.
    """
    folder = Path(folder)
    lock = Lock(folder.with_name(f'.{folder.name}.lock'), f'{what} {folder}')
    from_first(lambda: bool(lock.acquire()))
    try:
        yield
    finally:
        lock.release()


def read_text(path: str | Path) -> str:
    """The text of an options file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'options file {path} cannot be read: {getattr(e, "strerror", None) or e}.') from e


def keep_options(path: str | Path, text: str, folder: str | Path) -> None:
    """Write the options of a run into its folder, with the command and the time; its own copy stays as it is.

    Raises:
        OSError: as the file system says.
    """
    path, folder = Path(path), Path(folder)
    # a pipe or a file without suffix ('models') gets a name that is free for it
    kept = folder / (path.name if path.suffix in ('.yml', '.yaml') else 'options.yml')
    if kept.exists() and path.exists() and kept.samefile(path):
        return
    header = f'# GENERATE TIME: {time.asctime()}\n# CMD:\n# {" ".join(sys.argv)}\n\n'
    with atomic_path(kept) as temporary:
        temporary.write_text(header + text, encoding='utf-8')


def archive(folder: str | Path) -> Path | None:
    """Put a folder away under its name with the date; None where there is none.

    Raises:
        OSError: as the file system says; it is where it was.
    """
    folder = Path(folder)
    if not folder.exists():
        return None
    name = f'{folder.name}_archived_{time.strftime("%Y%m%d_%H%M%S")}'
    target, number = folder.with_name(name), 1
    while target.exists():  # another run of the same second
        number += 1
        target = folder.with_name(f'{name}_{number}')
    folder.rename(target)
    return target


def make_fresh(folder: str | Path, subfolders: list[str], fill=lambda folder: None) -> Path | None:
    """Make `folder` with `subfolders`, and ``fill(folder)`` in it; one that is there is archived when that is done.

    Returns:
        Where the older one lies now, if there was one.

    Raises:
        OSError: as the file system says; an older one is where it was.
    """
    folder = Path(folder)
    new = folder.with_name(f'.{folder.name}.part')
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed here; the lock is ours
    try:
        for path in (new, *(new / name for name in subfolders)):
            path.mkdir(parents=True)
        fill(new)
        archived = archive(folder)
        new.rename(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return archived


class RunLog:
    """basicsr's logger for the time of one run: what is said before the run has a folder goes into its file later.

    A context manager. In the first process everything from INFO on is logged, in the others errors alone.

    Attributes:
        logger: basicsr's.
    """

    def __init__(self, rank: int):
        self.rank, self.logger = rank, get_root_logger()
        self._file: logging.FileHandler | None = None
        self._held = logging.handlers.MemoryHandler(HELD_RECORDS, logging.CRITICAL + 1, flushOnClose=False)

    def __enter__(self) -> 'RunLog':
        self.logger.setLevel(logging.INFO if self.rank == 0 else logging.ERROR)
        self.logger.addHandler(self._held)
        for handler in self.logger.handlers:  # basicsr's keeps the stream of its first use, closed since perhaps
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stderr
        # on a full disk the checkpoint says so, not every log line with a traceback
        self._before, logging.raiseExceptions = logging.raiseExceptions, False
        return self

    def open(self, path: str | Path) -> None:
        """Write into this file from now on, beginning with all that was said so far.

        Raises:
            OSError: it cannot be made.
        """
        if self.rank != 0:
            return
        self._file = logging.FileHandler(path, 'w', encoding='utf-8')
        self._file.setFormatter(logging.Formatter('%(asctime)s %(levelname)s: %(message)s'))
        self._held.setTarget(self._file)
        self._held.flush()
        self.logger.removeHandler(self._held)
        self.logger.addHandler(self._file)

    def __exit__(self, *exception) -> None:
        self.logger.removeHandler(self._held)
        self._held.close()
        if self._file is not None:
            self.logger.removeHandler(self._file)
            self._file.close()
        logging.raiseExceptions = self._before
