"""``ppsr test``"""

import sys

from ppsr.cli.train import add_run_options, load
from ppsr.training.distributed import leave_dist


def configure(parser) -> None:
    add_run_options(parser)


def run(args) -> int:
    from ppsr.training.test import test_pipeline, without_score

    opt, _ = load(args, is_train=False)
    try:
        bad = without_score(test_pipeline(opt))
    finally:
        leave_dist()
    if bad and opt['rank'] == 0:
        print(f'ppsr: error: {", ".join(bad)}: not every image has a score; the lines above say why.', file=sys.stderr)
    return 1 if bad else 0
