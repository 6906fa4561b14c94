"""``ppsr demo``"""


def configure(parser) -> None:
    pass


def run(args) -> int:
    import ppsr  # noqa: F401, registers
    from ppsr.demo import run_demo

    stopped_by = run_demo()
    return 0 if stopped_by is None else 128 + stopped_by
