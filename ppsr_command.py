"""Where the ``ppsr`` command starts: its words, and the standard streams.

A module of its own beside the package, because ``import ppsr`` registers networks in basicsr, as a plug-in must, and
that imports torch: seconds that ``ppsr --help``, ``--version`` and a typo should not take. What a command does once its
words are understood is in :mod:`ppsr.cli`.
"""

import argparse
import codecs
import contextlib
import errno
import importlib
import importlib.util
import io
import os
import sys
from pathlib import Path

__all__ = ['COMMANDS', 'build_parser', 'entry', 'main']

COMMANDS = {
    'train': 'train a network from an options file',
    'test': 'test a network on benchmarks, from an options file',
    'prepare': 'make LR images, sub-images, meta files and LMDBs from HR folders',
    'upscale': 'enlarge pictures',
    'video': 'enlarge a video, with its sound and subtitles',
    'web': 'a page in the browser that enlarges pictures on this machine',
    'mask': 'draw which pixels Pure-Pass finds pure',
    'compare': 'one picture: input, bicubic, ours, difference, mask',
    'calibrate': 'measure what fast settings cost, for upscale --max-loss',
    'convert': 'turn a .pth into a .safetensors that knows its configuration, and back',
    'export': 'write a network as an ONNX or ExecuTorch file for other runtimes',
    'complexity': 'parameters and multiply-adds by part, static or over a data set',
    'purity': 'share of pure pixels of a data set',
    'tables': "the paper's tables and plots from what is at hand",
    'study': 'train reduced versions of the rivals on equal terms',
    'demo': 'prepare, train, test and show a small example on this machine',
    'doctor': 'versions, device, backends, known breakages',
}
# what an ASCII or Latin-1 terminal is shown for the signs that our messages use; other signs as \x.. or \u....
PLAIN = {'×': 'x', '–': '-', '−': '-', '…': '...', '≥': '>=', '≤': '<=', '→': '->', '·': '*', '³': '^3', '⁹': '^9'}


# ------------------------------------------------------------------------------------------------------------- words


class _Store(argparse._StoreAction):
    """The plain kind of option, said twice: lists add up, anything else is a contradiction and refused."""

    def __call__(self, parser, namespace, values, option_string=None):
        repeated = self.dest in parser.given
        parser.given.add(self.dest)
        if self.nargs in ('+', '*'):
            values = [*(getattr(namespace, self.dest) if repeated else ()), *values]
        elif repeated:
            parser.error(f'argument {option_string}: given twice, and it takes one value')
        super().__call__(parser, namespace, values, option_string)


class _Parser(argparse.ArgumentParser):
    """Mistakes are told in one sentence; options that are said twice are :class:`_Store`'s affair."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.given: set[str] = set()
        self.register('action', None, _Store)
        self.register('action', 'store', _Store)

    def parse_known_args(self, args=None, namespace=None, **kwargs):
        self.given.clear()
        return super().parse_known_args(args, namespace, **kwargs)

    def _print_message(self, message: str, file=None):
        (file or sys.stderr).write(message)  # argparse keeps it to itself when that fails

    def error(self, message: str):
        self.exit(2, f'ppsr: error: {message}; see {self.prog} --help.\n')


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; of `command` with its options, which imports its module (and the package)."""
    parser = _Parser(prog='ppsr', description='Pure-Pass for BasicSR: PP-ATD-light super-resolution.')
    parser.add_argument('--version', action='version', version=f'ppsr {_version()}')
    subparsers = parser.add_subparsers(dest='command', metavar='command', required=True)
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary.capitalize() + '.')
        if name == command:
            importlib.import_module(f'ppsr.cli.{name}').configure(sub)
    return parser


def _version() -> str:
    """Of the package, without importing it."""
    found = {}
    folder = Path(importlib.util.find_spec('ppsr').origin).parent
    exec((folder / 'version.py').read_text(), found)
    return found['__version__']


def main(argv: list[str] | None = None) -> int:
    """Understand the words and run the command.

    Args:
        argv: the words after ``ppsr``; None = those of this process.

    Returns:
        0 when all went well, 1 when something failed on the way (said), 2 for a user's mistake, 128 + N after signal N.
    """
    argv = sys.argv[1:] if argv is None else argv
    if any('\0' in word for word in argv):
        print('ppsr: error: no word may hold a NUL character.', file=sys.stderr)
        return 2
    command = next((word for word in argv if not word.startswith('-')), None)
    try:
        args = build_parser(command).parse_args(argv)
    except SystemExit as stop:  # --help, --version or a mistake, which has been told
        return int(stop.code or 0)
    from ppsr.cli import run

    return run(args)


# ----------------------------------------------------------------------------------------------------------- streams


def entry(argv: list[str] | None = None) -> None:
    """The command as a process: standard streams in a state in which they can be used, then :func:`main`."""
    _open_streams()
    code = 1
    try:
        code = main(argv)
    except BrokenPipeError:  # `ppsr --help | head -1`
        pass
    except KeyboardInterrupt:  # while modules were imported; a command that runs tells its own
        code = 130
        print('ppsr: interrupted.', file=sys.stderr)
    except OSError as error:  # of --help: commands tell their own
        print(f'ppsr: error: standard output cannot be written: {error.strerror}.', file=sys.stderr)
    finally:
        code = _flush(code)
    sys.exit(code)


def _open_streams() -> None:
    for number in (0, 1, 2):  # a closed one: or the next file that is opened would be standard output
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    codecs.register_error('ppsr.plain', _in_plain_signs)
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(_Closed(), encoding='utf-8')
    else:
        sys.stdout.reconfigure(errors='ppsr.plain')
    encoding = getattr(sys.stderr, 'encoding', 'utf-8')
    raw = io.BufferedWriter(_Forgiving(2, 'w', closefd=False))
    sys.stderr = io.TextIOWrapper(raw, encoding=encoding, errors='ppsr.plain', line_buffering=True)


def _in_plain_signs(error: UnicodeError):
    signs = error.object[error.start : error.end]
    return ''.join(PLAIN.get(s) or s.encode('ascii', 'backslashreplace').decode() for s in signs), error.end


class _Closed(io.RawIOBase):
    """Standard output that was closed before we started: whoever writes to it is told so."""

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        raise OSError(errno.EBADF, 'Standard output is closed')


class _Forgiving(io.FileIO):
    """Standard error: that messages cannot be shown (a full disk behind it) is no reason to stop the work."""

    def write(self, data) -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return len(data)


def _flush(code: int) -> int:
    """Write out what standard output still holds; the exit code, worse where that is not possible."""
    try:
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        pass
    except OSError as error:
        print(f'ppsr: error: standard output cannot be written: {error.strerror}.', file=sys.stderr)
    # or Python tries it once more on leaving, and complains
    sys.stdout = open(os.devnull, 'w')  # noqa: SIM115
    return code or 1


if __name__ == '__main__':
    entry()
