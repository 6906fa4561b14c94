"""``ppsr train``"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import ppsr
from ppsr.cli.numbers import Number
from ppsr.errors import UserError
from ppsr.shipped import options_file
from ppsr.training.distributed import init_dist, leave_dist
from ppsr.training.processes import start_processes, suggestion

MAX_OPTIONS = 2**24  # characters of an options file; a pipe may have no end


def configure(parser) -> None:
    add_run_options(parser)
    parser.add_argument('--auto_resume', action='store_true', help='go on from the newest training state of this name')
    parser.add_argument(
        '--processes',
        type=Number(1, 1024),
        metavar='N',
        help='train in N processes on this machine, with batch_size_per_gpu pictures each; on a CPU N processes of one '
        'thread are faster than one of N',
    )


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
    if args.processes is not None:
        if args.launcher != 'none':
            raise UserError(f'--processes starts the processes itself: leave --launcher {args.launcher} out.')
        if args.processes > 1:
            return _run_several(args)
    from ppsr.training.train import train_pipeline

    opt, text = load(args, is_train=True)
    if args.processes is None and args.launcher == 'none' and opt['num_gpu'] == 0:
        advice = suggestion(opt['datasets']['train']['batch_size_per_gpu'])
        if advice is not None:
            print(f'ppsr: {advice}', file=sys.stderr)
    try:
        stopped_by = train_pipeline(opt, args.opt, text)
    finally:
        leave_dist()
    if stopped_by is None:
        return 0
    if opt['rank'] == 0:
        print(f'ppsr: stopped by {stopped_by.name}, a checkpoint is saved; go on with --auto_resume.', file=sys.stderr)
    return 128 + stopped_by


def _run_several(args) -> int:
    """The same command in several processes; what can be refused is refused before they start."""
    with _readable_twice(args.opt) as (path, _):
        opt, _ = load(argparse.Namespace(**vars(args) | {'opt': path}), is_train=True)
        gpus, count = opt['num_gpu'], args.processes
        if gpus and count > torch.cuda.device_count():
            raise UserError(f'--processes {count}: there are {torch.cuda.device_count()} GPUs, one for each process.')
        batch = opt['datasets']['train']['batch_size_per_gpu']
        print(
            f'ppsr: {count} processes with {batch} pictures each, a batch of {count * batch} in all '
            '(datasets → train → batch_size_per_gpu is that of a process).',
            file=sys.stderr,
        )
        script = Path(ppsr.__file__).with_name('train.py')  # needs no installed package
        command = [sys.executable, str(script), '-opt', path, '--launcher', 'pytorch']
        command += ['--auto_resume'] * args.auto_resume + ['--debug'] * args.debug
        if args.force_yml:
            command += ['--force_yml', *args.force_yml]
        return start_processes(command, count)
