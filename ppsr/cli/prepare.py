"""``ppsr prepare``: data sets from folders of HR images, and checks of prepared data sets."""

import argparse
import os
import sys
from pathlib import Path

from ppsr.cli.numbers import PIXELS, SCALE, Number
from ppsr.errors import UserError

SIDE = Number(1, 2**16)
JOBS = Number(1, 1024)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Make data sets from folders of HR images: exact bicubic LR images and, if asked for, sub-images, meta-info '
        'files and LMDBs. Knows the published folders of DIV2K, Flickr2K, Set5, Set14, BSD100, Urban100 and Manga109. '
        'Start it again to resume. See datasets/README.md.'
    )
    parser.add_argument('--hr', nargs='+', type=Path, metavar='DIR', help='folders of HR images, or of data sets')
    parser.add_argument('--name', help='name of the data set; all --hr folders go into it (default: one each)')
    parser.add_argument('-o', '--output', type=Path, default=Path('datasets'), metavar='DIR', help='default: datasets')
    parser.add_argument('--scale', nargs='+', type=SCALE, metavar='N', help='default: 2 3 4 (--check: all there are)')
    parser.add_argument('--sub-images', action='store_true', help='cut overlapping sub-images, for fast training')
    parser.add_argument('--crop-size', type=SIDE, default=480, metavar='N', help='side in HR pixels (default: 480)')
    parser.add_argument('--step', type=SIDE, default=240, metavar='N', help='distance in HR pixels (default: 240)')
    parser.add_argument('--thresh-size', type=PIXELS, default=0, metavar='N', help='ignore smaller rests (default: 0)')
    parser.add_argument('--lmdb', action='store_true', help='store the images, or the sub-images, in LMDBs as well')
    parser.add_argument('--meta-info', action='store_true', help="write basicsr's meta-info files")
    parser.add_argument(
        '--jobs', type=JOBS, default=os.cpu_count() or 1, metavar='N', help='processes (default: cores)'
    )
    parser.add_argument('--overwrite', action='store_true', help='make again what is already there')
    parser.add_argument('--check', action='store_true', help='read everything that is there and say what is wrong')


def run(args: argparse.Namespace) -> int:
    """0: done; 1: some images were unreadable, or --check found something."""
    if args.scale and len(set(args.scale)) < len(args.scale):
        raise UserError(f'--scale needs different numbers, but is {" ".join(map(str, args.scale))}.')
    if args.name and (os.path.basename(args.name) != args.name or args.name.startswith('.')):
        raise UserError(f'--name must be the name of a folder, without a path, but is {args.name!r}.')
    return _check(args) if args.check else _prepare(args)


def _prepare(args: argparse.Namespace) -> int:
    from ppsr.data.layout import DataSetFolders, find_sources
    from ppsr.data.prepare import Grid, prepare_dataset

    if not args.hr:
        raise UserError('Name the folders of HR images with --hr, or give --check.')
    scales = args.scale or [2, 3, 4]
    grid = Grid(args.crop_size, args.step, args.thresh_size) if args.sub_images else None
    unreadable = 0
    for name, sources in find_sources(args.hr, scales, args.name).items():
        folders = DataSetFolders(args.output / name)
        summary = prepare_dataset(folders, sources, scales, grid, args.lmdb, args.meta_info, args.jobs, args.overwrite)
        for line in summary.converted:
            print(line)
        for line in summary.unreadable:
            print(line, file=sys.stderr)
        unreadable += len(summary.unreadable)
        written = ', '.join(path.name for path in summary.written)
        print(
            f'{name}: {summary.made} images made, {summary.skipped} already there, '
            f'{len(summary.unreadable)} unreadable; in {folders.root}: {written}'
        )
    return 1 if unreadable else 0


def _check(args: argparse.Namespace) -> int:
    from ppsr.data.layout import DataSetFolders
    from ppsr.data.verify import verify_dataset

    if args.hr or args.sub_images or args.lmdb or args.meta_info or args.overwrite:
        raise UserError('--check only reads what is in -o/--output: use it with --name, --scale and --jobs alone.')
    if args.name:
        roots = [args.output / args.name]
    elif args.output.is_dir():
        roots = sorted(path for path in args.output.iterdir() if (path / 'HR').is_dir())
    else:
        roots = []
    if not roots:
        raise UserError(f'There is no data set in {args.output} (no folder <Name>/HR).')
    problems = 0
    for root in roots:
        report = verify_dataset(DataSetFolders(root), args.scale, args.jobs)
        for line in report.problems:
            print(line, file=sys.stderr)
        problems += len(report.problems)
        print(f'{root.name}: {report.pairs} pairs read, {len(report.problems)} problems')
    return 1 if problems else 0
