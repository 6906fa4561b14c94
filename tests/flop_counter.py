"""torch's FLOP counter, where it can be used."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ppsr.ops.window_attention import window_attention


@functools.cache
def _sees_operators() -> bool:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        window_attention(torch.zeros(1, 2, 2, 6), torch.zeros(9, 1), num_heads=1, window_size=2)
    return counter.get_total_flops() > 0


def flop_counter() -> FlopCounterMode:
    """A counter that prints nothing; skips the test where it does not see custom operators (torch 2.4)."""
    if not _sees_operators():
        pytest.skip(f'the FLOP counter of torch {torch.__version__} does not see custom operators')
    return FlopCounterMode(display=False)
