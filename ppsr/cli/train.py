"""``ppsr train``"""

import sys

from ppsr.shipped import options_file


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


def load(args, is_train: bool) -> dict:
    """Options of a run, with its data and its processes checked before anything is built."""
    import ppsr  # noqa: F401, registers
    from ppsr.data.checks import check_datasets
    from ppsr.training.distributed import init_dist
    from ppsr.training.options import load_options

    opt = load_options(args.opt, is_train, args.force_yml, args.debug, getattr(args, 'auto_resume', False))
    check_datasets(opt)
    init_dist(opt, args.launcher)
    return opt


def run(args) -> int:
    from ppsr.training.distributed import leave_dist
    from ppsr.training.train import train_pipeline

    opt = load(args, is_train=True)
    stopped_by = train_pipeline(opt, args.opt)
    leave_dist()
    if stopped_by is None:
        return 0
    if opt['rank'] == 0:
        print(f'ppsr: stopped by {stopped_by.name}, a checkpoint is saved; go on with --auto_resume.', file=sys.stderr)
    return 128 + stopped_by
