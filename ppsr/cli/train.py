"""``ppsr train``"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ppsr  # noqa: F401, registers
from ppsr.errors import UserError
from ppsr.shipped import options_file
from ppsr.training.distributed import init_dist, leave_dist

MAX_OPTIONS = 2**24  # characters of an options file; a pipe may have no end


def configure(parser) -> None:
    add_run_options(parser)
    parser.add_argument('--auto_resume', action='store_true', help='go on from the newest training state of this name')


def add_run_options(parser) -> None:
    """The options that training and testing share (BasicSR's names)."""
    parser.add_argument('-opt', required=True, type=options_file, metavar='YML', help='options file')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='who started us')
    parser.add_argument('--debug', action='store_true', help="BasicSR's debug mode: everything every 8 iterations")
    parser.add_argument(
        '--force_yml', nargs='+', default=[], metavar='KEY=VALUE', help='change options, e.g. train:ema_decay=0.999'
    )


def load(args, is_train: bool) -> tuple[dict, str | None]:
    """Options of a run, with its data and its processes checked before anything is built; and the text of their file
    where that cannot be read again."""
    from ppsr.data.checks import check_datasets
    from ppsr.training.options import load_options

    with _readable_twice(args.opt) as (path, text):
        opt = load_options(path, is_train, args.force_yml, args.debug, getattr(args, 'auto_resume', False))
    check_datasets(opt)
    init_dist(opt, args.launcher)
    return opt, text


@contextlib.contextmanager
def _readable_twice(path: str) -> Iterator[tuple[str, str | None]]:
    """A pipe (``-opt <(…)``) is read once, into a file for the time of this block, and its text is returned, too."""
    if not os.path.exists(path) or not Path(path).is_fifo():
        yield path, None
        return
    with open(path, encoding='utf-8', errors='replace') as pipe:
        text = pipe.read(MAX_OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, 'options.yml')
        copy.write_text(text, encoding='utf-8')
        try:
            yield str(copy), text
        except UserError as e:
            raise UserError(str(e).replace(str(copy), path)) from e


def run(args) -> int:
    from ppsr.training.train import train_pipeline

    opt, text = load(args, is_train=True)
    try:
        stopped_by = train_pipeline(opt, args.opt, text)
    finally:
        leave_dist()
    if stopped_by is None:
        return 0
    if opt['rank'] == 0:
        print(f'ppsr: stopped by {stopped_by.name}, a checkpoint is saved; go on with --auto_resume.', file=sys.stderr)
    return 128 + stopped_by
