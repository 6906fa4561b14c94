"""What a pure token gets in place of the attention inside its window, before the projection that follows.

Three kinds, one module each, named by ``pp_window_compensation``; a layer that may exempt tokens from its window
attention (:class:`ExemptingLayer`) has one as ``comp``. Only 'linear' has parameters. Shapes: map (B, H, W, C), P pure
tokens in row-major order.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['WINDOW_COMPENSATIONS', 'ExemptingLayer', 'WindowCompensation', 'fill_pure', 'mean5']


def mean5(x: Tensor) -> Tensor:
    """Mean of the 5×5 neighbourhood of each token, at the border of what there is of it: (B, H, W, C) -> the same."""
    mean = F.avg_pool2d(x.permute(0, 3, 1, 2), 5, stride=1, padding=2, count_include_pad=False)
    return mean.permute(0, 2, 3, 1)


def _pure_index(pure: Tensor) -> Tensor:
    """(B, H, W) bool -> (P,) int64"""
    return pure.flatten().nonzero().squeeze(1)


class WindowCompensation(nn.Module):
    """'value': a pure token gets its own value vector."""

    def forward(self, x: Tensor, norm: nn.LayerNorm, qkv: Tensor, pure: Tensor) -> Tensor:
        """What the pure tokens of a map get.

        Args:
            x: (B, H, W, C), what the layer was given.
            norm: the layer's, in front of its projection to queries, keys and values.
            qkv: (B, H, W, 3C), that projection of norm(x).
            pure: (B, H, W) bool.

        Returns:
            (P, C), a row for each pure token; under torch.compile, where a number of rows that depends on the data
            would break the graph, (B, H, W, C), in which the others' rows mean nothing.
        """
        return self._of_pure(pure, *self.maps(x, norm, qkv))

    def maps(self, x: Tensor, norm: nn.LayerNorm, qkv: Tensor) -> tuple[Tensor, ...]:
        """The maps of which the pure tokens' rows are taken."""
        return (qkv[..., 2 * x.shape[-1] :],)

    def rows(self, *maps: Tensor) -> Tensor:
        """Rows of the maps (…, C) -> what those tokens get (…, C)."""
        return maps[0]

    def _of_pure(self, pure: Tensor, *maps: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.rows(*maps)
        index = _pure_index(pure)
        return self.rows(*(m.flatten(0, 2)[index] for m in maps))

    def macs(self, pure: int) -> int:
        """Multiply-adds for so many pure tokens."""
        return 0


class MeanCompensation(WindowCompensation):
    """'mean': the mean of the value vectors around it."""

    def maps(self, x, norm, qkv):
        return (mean5(qkv[..., 2 * x.shape[-1] :]),)


class LinearCompensation(nn.Linear, WindowCompensation):
    """'linear': A z + B mean5(z) + c with z = norm(x), learned; the columns of `weight` (C, 2C) are A, then B."""

    def __init__(self, dim: int):
        super().__init__(2 * dim, dim)

    def forward(self, x, norm, qkv, pure):
        return WindowCompensation.forward(self, x, norm, qkv, pure)

    def maps(self, x, norm, qkv):
        z = norm(x)
        return z, mean5(z)

    def rows(self, *maps):
        return F.linear(torch.cat(maps, -1), self.weight, self.bias)

    def macs(self, pure):
        return pure * self.weight.numel()


WINDOW_COMPENSATIONS = ('linear', 'value', 'mean')


class ExemptingLayer(nn.Module):
    """A layer whose pure tokens may be exempt from window attention.

    Args:
        dim: C.
        scope: the attentions that pure tokens are exempt from.
        compensation: what they get in place of window attention, one of `WINDOW_COMPENSATIONS`.

    Attributes:
        scope: the attentions that pure tokens are exempt from now; :meth:`MaskedNetwork.exempting` changes it.
        comp: the :class:`WindowCompensation`, or None. Weight files with a learned one load into a layer without it:
            one file serves the network with every scope.
    """

    def __init__(self, dim: int, scope: Sequence[str], compensation: str):
        super().__init__()
        self.scope = tuple(scope)
        kinds = {'linear': LinearCompensation, 'value': WindowCompensation, 'mean': MeanCompensation}
        self.comp = None if 'window' not in scope else kinds[compensation](*[dim] if compensation == 'linear' else ())

    def exempt(self, attention: str, pure: Tensor | None) -> Tensor | None:
        """The mask of the pure tokens, or None where they are not exempt from this attention."""
        return pure if attention in self.scope else None

    def exempt_from_window(self, x: Tensor, pure: Tensor | None) -> Tensor | None:
        """That of window attention for a map x (B, H, W, C): (B, H, W) bool or None.

        A learned stand-in that is not asked for in this step of a training is asked for nothing: its gradient is zero
        and not absent, so that DistributedDataParallel, which waits for it, and optimizers see no difference.
        """
        pure = self.exempt('window', pure)
        if pure is None and isinstance(self.comp, LinearCompensation) and torch.is_grad_enabled():
            return torch.zeros(x.shape[:3], dtype=torch.bool, device=x.device)
        return None if pure is None else pure.view(x.shape[:3])

    def does_without(self) -> set[str]:
        """Names of parameters that a file may have and this layer has no use for."""
        return set() if isinstance(self.comp, LinearCompensation) else {'comp.weight', 'comp.bias'}

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name in self.does_without():
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def fill_pure(x: Tensor, pure: Tensor, instead: Tensor) -> Tensor:
    """x (B, H, W, C) with what :class:`WindowCompensation` found in the rows of the pure tokens."""
    if instead.dim() == x.dim():
        return torch.where(pure[..., None], instead.to(x.dtype), x)
    rows = x.flatten(0, 2)
    index, instead = _pure_index(pure), instead.to(x.dtype)
    if torch.is_grad_enabled():
        rows = rows.index_copy(0, index, instead)
    else:
        rows.index_copy_(0, index, instead)
    return rows.view(x.shape)
