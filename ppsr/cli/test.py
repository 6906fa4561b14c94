"""``ppsr test``"""

from ppsr.cli.train import add_run_options, load


def configure(parser) -> None:
    add_run_options(parser)


def run(args) -> int:
    from ppsr.training.test import test_pipeline

    test_pipeline(load(args, is_train=False))
    return 0
