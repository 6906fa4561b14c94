"""What the kinds of files have in common: exporters that keep quiet, their messages, writing, rounding."""

import copy
import io
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from torch import nn

from ppsr.atomic import atomic_path
from ppsr.errors import UserError

__all__ = ['first_line', 'quietly', 'rounded_to_half', 'write']


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


def write(path: Path, make: Callable[[], bytes]) -> None:
    """A file of what `make` gives, whole or not at all.

    Raises:
        UserError: it cannot be written there, which is known before `make` is called.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(make())
    except OSError as e:
        raise UserError(f'{path}: cannot be written ({e.strerror or e}).') from e


def rounded_to_half(net: nn.Module) -> nn.Module:
    """A copy whose parameters are float32 numbers that float16 has, too."""
    net = copy.deepcopy(net)
    for parameter in net.parameters():
        parameter.data = parameter.data.half().float()
    return net
