"""``ppsr web``"""

import argparse
from pathlib import Path

from ppsr.cli.numbers import Number
from ppsr.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--host',
        default='127.0.0.1',
        help='address to serve on; others than this machine reach 0.0.0.0 (default: 127.0.0.1)',
    )
    parser.add_argument('--port', type=Number(1, 65535), default=7860, help='default: 7860')
    parser.add_argument('--open', action='store_true', help='open the page in the browser')
    parser.add_argument(
        '--weights', nargs='+', default=[], metavar='FILE', help='weights to offer beside the shipped ones'
    )
    parser.add_argument(
        '--max-upload', type=Number(1, 4096), default=64, metavar='MIB', help='of a file, in MiB (default: 64)'
    )
    parser.add_argument(
        '--max-megapixels', type=Number(0.01, 178.0), default=4.0, metavar='N', help='of a picture (default: 4)'
    )
    parser.add_argument('--max-memory', metavar='SIZE', help='never use more, e.g. 4G (RAM, or GPU memory)')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:N (default: auto)')


def run(args) -> int:
    from ppsr.device import resolve_device
    from ppsr.pictures.memory import parse_size
    from ppsr.web.page import Limits, serve
    from ppsr.weights import read_checkpoint

    resolve_device(args.device)
    if args.max_memory is not None:
        parse_size(args.max_memory)
    files = {Path(name).name: Path(name) for name in args.weights}
    if len(files) < len(args.weights):
        raise UserError('--weights names two files of one name; the page could not tell them apart.')
    for path in files.values():
        read_checkpoint(path)  # a mistake is told now, not to the first visitor
    serve(
        args.host,
        args.port,
        files,
        Limits(args.max_upload * 2**20, args.max_megapixels),
        args.device,
        args.max_memory,
        args.open,
    )
    return 0
