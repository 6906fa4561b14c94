"""``ppsr purity``: share of pure pixels of a data set."""

import argparse
import json

from tqdm import tqdm

from ppsr.cli.numbers import CENTERS, PIXELS, SCALE, THRESHOLD, WINDOW
from ppsr.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--data', required=True, metavar='DIR', help='HR images (or LQ images with --lq)')
    parser.add_argument('--scale', type=SCALE, default=4, help='LQ images are made of HR by this scale (default: 4)')
    parser.add_argument('--lq', action='store_true', help='the images are LQ already')
    parser.add_argument(
        '--mask',
        default='colour',
        metavar='NAME',
        help="colour (the paper's), gradient, variance, dynamic, both",
    )
    parser.add_argument(
        '--threshold',
        type=THRESHOLD,
        nargs='+',
        metavar='T',
        help='of gradient (0.05), variance and both (0.07)',
    )
    parser.add_argument('--num-centers', type=CENTERS, nargs='+', metavar='K', help='default: 8')
    parser.add_argument('--window', type=WINDOW, nargs='+', metavar='W', help='default: 5')
    parser.add_argument(
        '--shift', type=PIXELS, metavar='S', help='offset of the second grid (default: half the window)'
    )
    parser.add_argument('--format', choices=('text', 'markdown', 'json'), default='text')


def run(args: argparse.Namespace) -> int:
    from ppsr.data.benchmark import find_images, read_lq
    from ppsr.paper import purity

    if args.mask != 'colour':
        return _other_masks(args)
    if args.threshold:
        raise UserError('--threshold belongs to the masks gradient, variance and both.')
    args.num_centers, args.window = args.num_centers or [8], args.window or [5]
    found, output = {}, []
    for name, sources in find_images(args.data, args.scale).items():
        images, sizes = {}, {}
        for source in tqdm(sources, desc=name, unit='image', leave=False, disable=None):
            lq = read_lq(source.path, None if args.lq else args.scale)
            images[source.stem] = purity.shares(lq, args.num_centers, args.window, args.shift)
            sizes[source.stem] = tuple(lq.shape[-2:])
        found[name] = {
            image: [dict(k=k, w=w, plain=share.plain, fused=share.fused) for (k, w), share in settings.items()]
            for image, settings in images.items()
        }
        if len(args.num_centers) * len(args.window) > 1:
            output.append(purity.grid_table(name, list(images.values())))
        else:
            only = (args.num_centers[0], args.window[0])
            setting = f'K = {only[0]}, w = {only[1]}, shift {only[1] // 2 if args.shift is None else args.shift}'
            output.append(
                purity.image_table(name, sizes, {image: shares[only] for image, shares in images.items()}, setting)
            )
    if args.format == 'json':
        print(json.dumps(found, indent=2))
    else:
        print('\n'.join(t.markdown() if args.format == 'markdown' else t.text() for t in output), end='')
    return 0


def _other_masks(args: argparse.Namespace) -> int:
    """The share that a mask without a plain grid of its own to show finds, for each of its settings."""
    from ppsr.data.benchmark import find_images, read_lq
    from ppsr.paper import purity

    grid = {'threshold': args.threshold, 'num_centers': args.num_centers, 'window_size': args.window}
    masks = purity.mask_grid(args.mask, args.shift, **{name: values for name, values in grid.items() if values})
    found, output = {}, []
    for name, sources in find_images(args.data, args.scale).items():
        images = {}
        for source in tqdm(sources, desc=name, unit='image', leave=False, disable=None):
            lq = read_lq(source.path, None if args.lq else args.scale)
            images[source.stem] = {label: mask(lq).double().mean().item() for label, mask in masks.items()}
        found[name] = images
        output.append(purity.masks_table(name, images, args.mask))
    if args.format == 'json':
        print(json.dumps(found, indent=2))
    else:
        print('\n'.join(t.markdown() if args.format == 'markdown' else t.text() for t in output), end='')
    return 0
