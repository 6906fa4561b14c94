"""What follows from weights alone is computed once, and anew when they change."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ppsr.ops.dispatch import has_data

__all__ = ['OncePerWeights', 'may_keep']

T = TypeVar('T')


class OncePerWeights:
    """Keeps what was computed from weights until one of them has another value.

    Values are compared, not versions: what moving averages and others write through ``.data`` raises no version.
    """

    def __init__(self):
        self._kept: tuple[Tensor, object] | None = None  # the weights in a row, and what came of them

    def get(self, weights: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """compute(), or what it gave when the weights were the same bit for bit; only under no_grad."""
        now = torch.cat([weight.flatten() for weight in weights])
        kept = self._kept
        same = kept is not None and (kept[0].dtype, kept[0].device) == (now.dtype, now.device)
        if not (same and torch.equal(kept[0], now)):
            kept = self._kept = now, compute()
        return kept[1]

    def __reduce__(self):  # copies and pickles of a network begin with nothing kept
        return OncePerWeights, ()


def may_keep(weight: Tensor) -> bool:
    """Whether what is made of weights like this one may be kept: no gradient wanted, no graph being recorded, in which
    weights cannot be compared."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if not has_data(weight) or torch.is_autocast_enabled(weight.device.type):
        return False
    return not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
