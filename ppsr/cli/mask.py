"""``ppsr mask``"""

import sys

from ppsr.archs import PPATDLight
from ppsr.archs.build import network_arguments
from ppsr.cli.numbers import CENTERS, PIXELS, THRESHOLD, WINDOW, Number
from ppsr.errors import UserError
from ppsr.images import as_rgb, atomic_file, format_of, read_picture, write_picture
from ppsr.masks import build_mask


def configure(parser) -> None:
    parser.add_argument('-i', '--input', nargs='+', required=True, metavar='INPUT', help='pictures, folders, globs')
    parser.add_argument('-o', '--output', required=True, help='folder; for one picture also a file name')
    parser.add_argument('-r', '--recursive', action='store_true', help='descend into folders, keeping their tree')
    parser.add_argument('--suffix', default='mask', help='NAME becomes NAME_SUFFIX (default: mask)')
    parser.add_argument('--overwrite', action='store_true', help='redo outputs that exist (default: skip them)')
    parser.add_argument(
        '--zoom', type=Number(1, 64), default=4, help='pixels of the overlay per pixel of the input (default: 4)'
    )
    parser.add_argument(
        '--mask',
        default='colour',
        metavar='NAME',
        help="colour (the paper's), gradient, variance, dynamic, both",
    )
    parser.add_argument('--threshold', type=THRESHOLD, metavar='T', help='of gradient (0.05), variance and both (0.07)')
    parser.add_argument('--num-centers', type=CENTERS, metavar='K', help='colour centres (default: 8)')
    parser.add_argument('--window-size', type=WINDOW, metavar='W', help='side of the windows (default: 5)')
    parser.add_argument('--shift', type=PIXELS, help='offset of the second grid (default: half a window)')
    parser.add_argument('--no-fuse', action='store_true', help='without the second grid')


def run(args) -> int:
    from ppsr.pictures.batch import STREAM, exists, open_source, plan_jobs
    from ppsr.pictures.visualize import enlarge_nearest, mask_overlay, network_mask

    settings = {name: getattr(args, name) for name in ('num_centers', 'window_size', 'shift', 'threshold')}
    settings['fuse'] = False if args.no_fuse else None
    try:
        pure_pass = build_mask(args.mask, **{name: value for name, value in settings.items() if value is not None})
    except ValueError as error:
        raise UserError(str(error).rstrip('.') + '.') from None
    multiple = network_arguments(PPATDLight)['window_size'].default  # as the published networks pad
    plan = plan_jobs(args.input, args.output, args.suffix, 'png', args.recursive)
    if any(STREAM in (job.source, job.target) for job in plan.jobs):
        raise UserError('ppsr mask reads and writes files, not standard input and output.')
    for line in (*plan.notes, *(f'Failed: {sentence}' for sentence in plan.failed)):
        print(line, file=sys.stderr)
    failed, shares = len(plan.failed), []
    for job in plan.jobs:
        try:
            if not args.overwrite and exists(job.target):
                print(f'{job.target} exists already (--overwrite replaces it).')
                continue
            rgb = as_rgb(read_picture(open_source(job.source)).pixels)
            pure = network_mask(rgb, pure_pass, multiple)
            overlay = mask_overlay(rgb, pure, pure_pass)
            shape = (args.zoom * overlay.shape[0], args.zoom * overlay.shape[1], 3)
            rows = (enlarge_nearest(row[None], args.zoom) for row in overlay)  # never all of it in memory
            with atomic_file(job.target) as file:
                write_picture(file, format_of(job.target), shape, overlay.dtype, rows)
        except UserError as error:
            print(f'Failed: {error}', file=sys.stderr)
            failed += 1
            continue
        shares.append(pure.mean())
        print(f'{job.source}: {shares[-1]:.2%} pure')
    if len(shares) > 1:
        print(f'Mean of {len(shares)} images: {sum(shares) / len(shares):.2%} pure')
    return 1 if failed else 0
