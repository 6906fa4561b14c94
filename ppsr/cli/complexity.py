"""``ppsr complexity``: parameters and multiply-adds of the network of an options file."""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from ppsr.cli.numbers import Number
from ppsr.errors import UserError
from ppsr.shipped import options_file


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '-opt', required=True, type=options_file, metavar='YML', help='options file; its network_g is built'
    )
    parser.add_argument(
        '--input-size',
        nargs=3,
        type=Number(1, 2**20),
        metavar=('C', 'H', 'W'),
        help='size of the LQ image of the static figures (default: the one that becomes 1280×720)',
    )
    parser.add_argument('--data', metavar='DIR', help='HR images: figures over the images, from the masks really used')
    parser.add_argument('--lq', action='store_true', help='the images of --data are LQ already')
    parser.add_argument('--format', choices=('text', 'markdown', 'json'), default='text')


def run(args: argparse.Namespace) -> int:
    from ppsr.data.benchmark import find_images, read_lq
    from ppsr.paper import complexity

    net = complexity.build_from_options(args.opt)
    channels, *size = args.input_size or (3, *complexity.static_size(net.upscale))
    if channels != 3:
        raise UserError(f'--input-size {channels} {size[0]} {size[1]}: write 3, a height and a width.')
    scale = None if args.lq else net.upscale
    costs = {}
    for name, sources in find_images(args.data, net.upscale).items() if args.data else ():
        progress = tqdm(sources, desc=name, unit='image', leave=False, disable=None)
        costs[name] = [complexity.image_cost(net, read_lq(s.path, scale), s.stem) for s in progress]
    if args.format == 'json':
        print(json.dumps({'options': Path(args.opt).name} | complexity.as_dict(net, *size, costs), indent=2))
        return 0
    tables = [complexity.static_table(net, *size)]
    tables += [complexity.dynamic_table(name, images) for name, images in costs.items()]
    print('\n'.join(table.markdown() if args.format == 'markdown' else table.text() for table in tables), end='')
    return 0
