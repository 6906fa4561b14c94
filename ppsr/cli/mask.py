"""``ppsr mask``"""

import sys
from pathlib import Path

from ppsr.cli.numbers import CENTERS, PIXELS, WINDOW, Number


def configure(parser) -> None:
    parser.add_argument('-i', '--input', nargs='+', required=True, metavar='INPUT', help='pictures, folders, globs')
    parser.add_argument('-o', '--output', required=True, help='folder; for one picture also a file name')
    parser.add_argument('-r', '--recursive', action='store_true', help='descend into folders, keeping their tree')
    parser.add_argument('--suffix', default='mask', help='NAME becomes NAME_SUFFIX (default: mask)')
    parser.add_argument('--overwrite', action='store_true', help='redo outputs that exist (default: skip them)')
    parser.add_argument(
        '--zoom', type=Number(1, 64), default=4, help='pixels of the overlay per pixel of the input (default: 4)'
    )
    parser.add_argument('--num-centers', type=CENTERS, default=8, metavar='K', help='colour centres (default: 8)')
    parser.add_argument('--window-size', type=WINDOW, default=5, metavar='W', help='side of the windows (default: 5)')
    parser.add_argument('--shift', type=PIXELS, help='offset of the second grid (default: half a window)')
    parser.add_argument('--no-fuse', action='store_true', help='without the second grid')


def run(args) -> int:
    from ppsr.errors import UserError
    from ppsr.images import as_rgb, read_picture, write_file
    from ppsr.masks.pure_pass import PurePass
    from ppsr.pictures.batch import plan_jobs
    from ppsr.pictures.visualize import enlarge_nearest, mask_overlay, network_mask

    try:
        pure_pass = PurePass(args.num_centers, args.window_size, args.shift, not args.no_fuse)
    except ValueError as error:
        raise UserError(f'{error}.') from None
    failed, shares = 0, []
    for job in plan_jobs(args.input, args.output, args.suffix, 'png', args.recursive):
        if '-' in (job.source, job.target):
            raise UserError('ppsr mask reads and writes files, not standard input and output.')
        if not args.overwrite and Path(job.target).exists():
            print(f'{job.target} exists already (--overwrite replaces it).')
            continue
        try:
            rgb = as_rgb(read_picture(job.source).pixels)
            pure = network_mask(rgb, pure_pass)
            write_file(job.target, enlarge_nearest(mask_overlay(rgb, pure, args.num_centers), args.zoom))
        except UserError as error:
            print(f'Failed: {error}', file=sys.stderr)
            failed += 1
            continue
        shares.append(pure.mean())
        print(f'{job.source}: {shares[-1]:.2%} pure')
    if len(shares) > 1:
        print(f'Mean of {len(shares)} images: {sum(shares) / len(shares):.2%} pure')
    return 1 if failed else 0
