"""The ``ppsr`` command. Each subcommand is a module of this folder with configure(parser) and run(args)."""

import argparse
import importlib
import os
import signal
import sys

from ppsr.version import __version__

__all__ = ['main']

COMMANDS = {
    'train': 'train a network from an options file',
    'test': 'test a network on benchmarks, from an options file',
    'prepare': 'make LR images, sub-images, meta files and LMDBs from HR folders',
    'upscale': 'enlarge pictures',
    'mask': 'draw which pixels Pure-Pass finds pure',
    'compare': 'one picture: input, bicubic, ours, difference, mask',
    'convert': 'turn a .pth into a .safetensors that knows its configuration, and back',
    'complexity': 'parameters and multiply-adds by part, static or over a data set',
    'purity': 'share of pure pixels of a data set',
    'tables': "the paper's tables and plots from what is at hand",
    'study': 'train reduced versions of the rivals on equal terms',
    'demo': 'prepare, train, test and show a small example on this machine',
    'doctor': 'versions, device, backends, known breakages',
}


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='ppsr', description='Pure-Pass for BasicSR: PP-ATD-light super-resolution.', allow_abbrev=False
    )
    parser.add_argument('--version', action='version', version=f'ppsr {__version__}')
    subparsers = parser.add_subparsers(dest='command', metavar='command', required=True)
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary.capitalize() + '.', allow_abbrev=False)
        if name == command:  # only the command that runs is imported: --help and typos answer at once
            importlib.import_module(f'ppsr.cli.{name}').configure(sub)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when all went well, 1 when something failed on the way (said), 2 for a user's mistake, 130 after Ctrl-C.
    """
    from ppsr.errors import UserError

    argv = sys.argv[1:] if argv is None else argv
    command = next((word for word in argv if not word.startswith('-')), None)
    try:
        args = _parser(command).parse_args(argv)
        from ppsr.runtime import tune_process

        tune_process()
        return importlib.import_module(f'ppsr.cli.{args.command}').run(args) or 0
    except UserError as e:
        print(f'ppsr: error: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('ppsr: interrupted.', file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `ppsr … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
