"""``ppsr study``: reduced networks trained on equal terms, and what came of it."""

import argparse
from pathlib import Path

from ppsr.shipped import options_file


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '-opt', required=True, type=options_file, metavar='YML', help='options of the study (options/study.yml)'
    )
    parser.add_argument('-o', '--output', metavar='DIR', help='write study.md, .csv and .tex there, too')


def run(args: argparse.Namespace) -> int:
    from ppsr.paper import study

    opt = study.load_study(args.opt)
    table = study.study_table(opt, study.run(opt, Path('results') / opt['name']))
    print(table.text(), end='')
    if args.output:
        study.write(args.output, table)
    return 0
