"""What the kinds of files have in common: exporters that keep quiet, their messages, writing."""

import io
import logging
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from ppsr.atomic import atomic_path
from ppsr.errors import UserError

__all__ = ['first_line', 'quietly', 'write']


def quietly(work, *args):
    """work(*args). Exporters tell their progress on standard output, and warn of what does not concern our users."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter('ignore')
        logging.disable(logging.WARNING)
        try:
            return work(*args)
        finally:
            logging.disable(before)


def first_line(error: Exception) -> str:
    """What an exception of somebody else's says, without what follows."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip('.')


def write(path: Path, content: bytes) -> None:
    """A file, whole or not at all; UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    except OSError as e:
        raise UserError(f'{path}: cannot be written ({e.strerror or e}).') from e
