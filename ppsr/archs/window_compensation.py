"""What a pure token gets in place of the attention inside its window, before the projection that follows.

Three kinds, one module each, named by ``pp_window_compensation``; a layer that may exempt tokens from its window
attention (:class:`ExemptingLayer`) has one as ``comp``. Only 'linear' has parameters.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ppsr.ops.stand_in import fill_pure, linear_stand_in, mean5

__all__ = ['WINDOW_COMPENSATIONS', 'ExemptingLayer', 'WindowCompensation']


class WindowCompensation(nn.Module):
    """'value': a pure token gets its own value vector."""

    def forward(self, out: Tensor, x: Tensor, norm: nn.LayerNorm, qkv: Tensor, pure: Tensor) -> Tensor:
        """The attention's output with what pure tokens get.

        Args:
            out: (B, H, W, C), the attention's output; without gradients it is written to.
            x: (B, H, W, C), what the layer was given.
            norm: the layer's, in front of its projection to queries, keys and values.
            qkv: (B, H, W, 3C), that projection of norm(x).
            pure: (B, H, W) bool.
        """
        return fill_pure(out, pure, lambda: (qkv[..., 2 * x.shape[-1] :],), lambda v: v)

    def macs(self, pure: int) -> int:
        """Multiply-adds for so many pure tokens."""
        return 0


class MeanCompensation(WindowCompensation):
    """'mean': the mean of the value vectors around it, 5×5."""

    def forward(self, out, x, norm, qkv, pure):
        return fill_pure(out, pure, lambda: (mean5(qkv[..., 2 * x.shape[-1] :]),), lambda v: v)


class LinearCompensation(nn.Linear, WindowCompensation):
    """'linear': A z + B mean5(z) + c with z = norm(x), learned; the columns of `weight` (C, 2C) are A, then B."""

    def __init__(self, dim: int):
        super().__init__(2 * dim, dim)

    def forward(self, out, x, norm, qkv, pure):
        return linear_stand_in(out, pure, x, norm, self.weight, self.bias)

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

    def window_example(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a stand-in can be fitted to, for a map x (B, H, W, C) as the layer is given it: z = norm(x), and what
        window attention makes of it before its projection, nothing exempt; both (B, H, W, C)."""
        raise NotImplementedError(f'{type(self).__name__} has no window attention that a stand-in can be fitted to')

    def exemption(self, x: Tensor, norm: nn.LayerNorm, qkv: Tensor, pure: Tensor | None) -> dict:
        """Further arguments of :class:`~ppsr.archs.atd_layers.WindowAttention` for a map x (B, H, W, C), the norm in
        front of its projection, that projection qkv (B, H, W, 3C), and the mask of its pure tokens (B, N) or None."""
        pure = self.exempt_from_window(x, pure)
        if pure is None:
            return {}
        return {'pure': pure, 'compensate': partial(self.comp, x=x, norm=norm, qkv=qkv, pure=pure)}

    def window_macs(self, attention: nn.Module, tokens: int, active: list[int]) -> int:
        """Multiply-adds of window attention and of what stands in for it, for images of so many tokens, of which
        `active` of each image are not exempt."""
        pure = len(active) * tokens - sum(active) if 'window' in self.scope else 0
        if not pure:
            return attention.macs(len(active), tokens)
        return attention.macs(len(active), tokens, pure) + self.comp.macs(pure)

    def does_without(self) -> set[str]:
        """Names of parameters that a file may have and this layer has no use for."""
        return set() if isinstance(self.comp, LinearCompensation) else {'comp.weight', 'comp.bias'}

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name in self.does_without():
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
