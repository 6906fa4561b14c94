"""``ppsr demo``"""

import ppsr  # noqa: F401, registers


def configure(parser) -> None:
    pass


def run(args) -> int:
    from ppsr.demo import run_demo

    stopped_by = run_demo()
    return 0 if stopped_by is None else 128 + stopped_by
