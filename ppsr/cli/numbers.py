"""Numbers on the command line: each has a range, which its error message says."""

import argparse
from dataclasses import dataclass

__all__ = ['CENTERS', 'PIXELS', 'SCALE', 'THRESHOLD', 'WINDOW', 'Number']


@dataclass(frozen=True)
class Number:
    """An argparse type: a number from `low` to `high`.

    >>> Number(1, 100)('95')
    95
    >>> Number(0.01, 100.0)('1e-300')
    Traceback (most recent call last):
    argparse.ArgumentTypeError: '1e-300' is not a number from 0.01 to 100
    """

    low: float
    high: float

    def __call__(self, text: str) -> int | float:
        kind = float if isinstance(self.low, float) else int
        try:
            value = kind(text) if len(text) < 100 else None  # int() of a million digits takes its time
        except ValueError:
            value = None
        if value is None or not self.low <= value <= self.high:
            shown = text if len(text) < 40 else f'{text[:30]}…'
            low, high = (f'{bound:g}' if kind is float else f'{bound:,}' for bound in (self.low, self.high))
            what = 'number' if kind is float else 'whole number'
            raise argparse.ArgumentTypeError(f'{shown!r} is not a {what} from {low} to {high}')
        return value


CENTERS = Number(1, 4096)
WINDOW = Number(1, 2**20)
SCALE = Number(1, 64)
THRESHOLD = Number(1e-6, 2.0)
PIXELS = Number(0, 2**20)  # a length in pixels, where 0 has a meaning
