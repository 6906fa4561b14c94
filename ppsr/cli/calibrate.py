"""``ppsr calibrate``: what the settings of Pure-Pass cost and save with given weights."""

import argparse

from ppsr.cli.numbers import THRESHOLD, Number
from ppsr.device import resolve_device

IMAGES = Number(5, 10_000)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Write weights with a stand-in for window attention, fitted in closed form where they have none, and with the '
        'curve that `ppsr upscale --max-loss` and `--saving` choose from: quality lost and multiply-adds saved on '
        'pictures, for each setting. Takes a minute or two.'
    )
    parser.add_argument('-n', '--model', required=True, metavar='MODEL', help='shipped weights by name, or a file')
    parser.add_argument('--data', required=True, metavar='DIR', help='large pictures, in any layout of ppsr prepare')
    parser.add_argument('-o', '--output', required=True, metavar='FILE', help='.safetensors to write')
    parser.add_argument('--images', type=IMAGES, default=20, metavar='N', help='measure at most N (default: 20)')
    parser.add_argument('--thresholds', nargs='+', type=THRESHOLD, metavar='T', help='of the mask gradient')
    parser.add_argument('--refit', action='store_true', help='fit a stand-in where the weights have one')
    parser.add_argument(
        '--no-ground-truth',
        action='store_true',
        help='the pictures are inputs: losses are estimated from how much the result changes',
    )
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:N (default: auto)')


def run(args: argparse.Namespace) -> int:
    from ppsr.calibration.measure import THRESHOLDS, calibrate
    from ppsr.paper.report import Table

    curve, fitted = calibrate(
        args.model,
        args.data,
        args.output,
        args.images,
        args.thresholds or THRESHOLDS,
        args.refit,
        not args.no_ground_truth,
        resolve_device(args.device),
    )
    rows = [
        [' + '.join(p.scope), p.mask, p.threshold, 100 * p.saved, 1000 * p.loss, 1000 * p.loss_at(95)]
        for p in curve.points
    ]
    header = ['exempt from', 'mask', 'threshold', 'saved (%)', 'loss (mdB)', 'on 95 % (mdB)']
    caption = f'{args.output}: {curve.images} images of {curve.data}, against {curve.against}'
    print(Table(header, rows, ['', '', '.3g', '.1f', '+.1f', '+.1f'], caption).text(), end='')
    print('The stand-in for window attention was fitted.' if fitted else 'The stand-in is that of the weights.')
    return 0
