"""``ppsr tables``: measured and published figures side by side, as tables and plots."""

import argparse
import shlex
import sys
from pathlib import Path

from ppsr.cli.numbers import SCALE
from ppsr.shipped import options_file
from ppsr.weights import list_pretrained


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--data', default='datasets', metavar='DIR', help='folder with the benchmarks (default: datasets)'
    )
    parser.add_argument('-o', '--output', default='docs/tables', metavar='DIR', help='default: docs/tables')
    parser.add_argument(
        '--weights',
        nargs='+',
        metavar='[LABEL=]FILE',
        help='weight files, for the network of that label or for those that they fit (default: the shipped ones)',
    )
    parser.add_argument(
        '-opt', nargs='+', default=[], type=options_file, metavar='YML', help='options files whose networks become rows'
    )
    parser.add_argument('--scales', nargs='+', type=SCALE, default=[2, 3, 4], metavar='N', help='default: 2 3 4')
    parser.add_argument(
        '--ablations',
        nargs='*',
        metavar='NAME',
        help='data sets of the ablations (default: all; without a name: neither ablations nor controls)',
    )
    parser.add_argument(
        '--cache',
        default='results/tables.jsonl',
        metavar='FILE',
        help='records of images already measured; delete it to measure again (default: results/tables.jsonl)',
    )


def run(args: argparse.Namespace) -> int:
    from ppsr.paper.tables import make

    weights = args.weights or list(list_pretrained().values())
    command = shlex.join(['ppsr', *_without_places(sys.argv[1:])])
    options = [Path(path) for path in args.opt]
    make(args.data, args.output, args.cache, weights, args.scales, options, args.ablations, command)
    print(f'{args.output}: written; begin with README.md.')
    return 0


def _without_places(words: list[str]) -> list[str]:
    """A command without where its files lie, which says nothing about the figures and is of one machine."""
    kept, words = [], iter(words)
    for word in words:
        if word in ('-o', '--output', '--cache'):
            next(words, None)
        elif not word.startswith(('--output=', '--cache=')):
            kept.append(word)
    return kept
