"""The commands of ``ppsr``: each is a module of this folder with configure(parser) and run(args).

Their names and the parsing are in :mod:`ppsr_command`; here is what holds for all of them while they run: mistakes and
failures are a sentence and an exit code, and signals that end the process let it clean up first.
"""

import argparse
import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator

from ppsr.errors import UserError
from ppsr.runtime import forbid_unpickling, tune_process
from ppsr_command import COMMANDS, build_parser, main

__all__ = ['COMMANDS', 'build_parser', 'main', 'run']


def run(args: argparse.Namespace) -> int:
    """Run the command ``args.command``.

    Returns:
        0 when all went well, 1 when something failed on the way (said), 2 for a user's mistake, 128 + N after signal N.
    """
    try:
        with _signals(), forbid_unpickling():
            tune_process()
            return importlib.import_module(f'ppsr.cli.{args.command}').run(args) or 0
    except UserError as error:
        return _tell(f'error: {error}', 2)
    except KeyboardInterrupt:
        return _tell('interrupted.', 128 + signal.SIGINT)
    except _Ended as end:
        return _tell(f'ended by {end.signal.name}.', 128 + end.signal)
    except BrokenPipeError:  # `ppsr … | head`
        return 1
    except OSError as error:  # the machine's state, not a fault of the program: a full disk, too many open files
        where = f'{error.filename}: ' if error.filename else ''
        return _tell(f'error: {where}{error.strerror or error}.', 1)


def _tell(text: str, code: int) -> int:
    text = text.encode('utf-8', 'backslashreplace').decode()  # names of files need not be text
    print(f'ppsr: {text}', file=sys.stderr)
    return code


class _Ended(BaseException):
    """A signal that asks the process to end: unwinds like Ctrl-C, so that no temporary file stays."""

    def __init__(self, number: int):
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM (batch systems) and SIGHUP (a closed terminal) unwind; one that is ignored (nohup) stays ignored."""

    def end(number, frame):
        raise _Ended(number)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in filter(None, (signal.SIGTERM, getattr(signal, 'SIGHUP', None))):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
