"""What a pure token gets in place of the attention inside its window, before the projection that follows.

Three kinds, one module each, named by ``pp_window_compensation``; a layer that may exempt tokens from its window
attention (:class:`ExemptingLayer`) has one as ``comp``. Only 'linear' has parameters.
"""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ppsr.archs.once import OncePerWeights, may_keep
from ppsr.ops.eligibility import are_untouched, are_unwatched
from ppsr.ops.stand_in import fill_pure, linear_stand_in, mean5

__all__ = ['WINDOW_COMPENSATIONS', 'ExemptingLayer', 'LinearInPlace', 'WindowCompensation']


class LinearInPlace(NamedTuple):
    """A linear function of z = norm(x) at a token and of the mean of that around it: own·z + around·mean5(z) + bias."""

    own: Tensor | None  # (C, C); None: the token itself plays no part
    around: Tensor | None  # (C, C)
    bias: Tensor  # (C,)

    def through(self, layer: nn.Linear) -> 'LinearInPlace':
        """The same, then a linear layer C to C."""
        own, around = (None if part is None else layer.weight @ part for part in self[:2])
        return LinearInPlace(own, around, layer.weight @ self.bias + layer.bias)

    def __add__(self, other: 'LinearInPlace') -> 'LinearInPlace':
        own, around = (b if a is None else a if b is None else a + b for a, b in zip(self[:2], other[:2]))
        return LinearInPlace(own, around, self.bias + other.bias)

    def stand_in(self) -> 'StandIn':
        weight = torch.cat([part for part in self[:2] if part is not None], 1)
        return StandIn(weight, self.bias, self.own is not None, self.around is not None)


class StandIn(NamedTuple):
    """A :class:`LinearInPlace` as :func:`~ppsr.ops.stand_in.linear_stand_in` takes it."""

    weight: Tensor
    bias: Tensor
    own: bool
    around: bool

    def seen(self) -> dict[str, bool]:
        return {'own': self.own, 'around': self.around}


class WindowCompensation(nn.Module):
    """'value': a pure token gets its own value vector.

    Attributes:
        sees: what it depends on, names in :class:`LinearInPlace`.
    """

    sees: ClassVar[tuple[str, ...]] = ('own',)

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

    def in_place(self, v: LinearInPlace) -> LinearInPlace:
        """What it is as a function of z, given what the value vectors are."""
        return v

    def macs(self, pure: int) -> int:
        """Multiply-adds for so many pure tokens."""
        return 0


class MeanCompensation(WindowCompensation):
    """'mean': the mean of the value vectors around it, 5×5."""

    sees = ('around',)

    def forward(self, out, x, norm, qkv, pure):
        return fill_pure(out, pure, lambda: (mean5(qkv[..., 2 * x.shape[-1] :]),), lambda v: v)

    def in_place(self, v):
        return LinearInPlace(None, v.own, v.bias)  # a mean of values is the value of the mean


class LinearCompensation(nn.Linear, WindowCompensation):
    """'linear': A z + B mean5(z) + c with z = norm(x), learned; the columns of `weight` (C, 2C) are A, then B."""

    sees = ('own', 'around')

    def __init__(self, dim: int):
        super().__init__(2 * dim, dim)

    def forward(self, out, x, norm, qkv, pure):
        return linear_stand_in(out, pure, x, norm, self.weight, self.bias)

    def in_place(self, v):
        return LinearInPlace(*self.weight.chunk(2, 1), self.bias)

    def macs(self, pure):
        return pure * self.weight.numel()


KINDS = {'linear': LinearCompensation, 'value': WindowCompensation, 'mean': MeanCompensation}
WINDOW_COMPENSATIONS = tuple(KINDS)


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
        self.kept = OncePerWeights()
        self.comp = None if 'window' not in scope else KINDS[compensation](*[dim] if compensation == 'linear' else ())

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

    def in_one(
        self, pure: Tensor | None, qkv: nn.Linear, window: nn.Module, category: nn.Module | None = None
    ) -> StandIn | None:
        """What a pure token gets in place of all attention that it is exempt from, projections and all.

        Every part of it is linear in z = norm(x), value vectors as well, so that one small product gives their sum:
        inference needs neither queries nor projections of pure tokens.

        Args:
            pure: mask of the pure tokens, or None.
            qkv: the layer's projection of z to queries, keys and values.
            window, category: the attentions; each with its `proj`; None: there is no such attention.

        Returns:
            None where each attention is to give its own: nothing is pure, a gradient is wanted, somebody watches or has
            replaced a module, torch.compile, autocast and CUDA, where gathering rows costs more than it saves.
        """
        if pure is None or self.comp is None or 'window' not in self.scope or not may_keep(qkv.weight):
            return None
        attentions = [window, category] if category is not None and 'category' in self.scope else [window]
        linears = [qkv, *(attention.proj for attention in attentions)]
        # of all: results of any module may be written over, which nobody who keeps them must see
        plain = are_untouched(nn.Linear, *linears) and are_unwatched(*self.children())
        if qkv.weight.is_cuda or not (plain and type(self.comp) in KINDS.values() and pure.any()):
            return None

        def compute():
            v = LinearInPlace(qkv.weight.chunk(3)[2], None, qkv.bias.chunk(3)[2])
            found = self.comp.in_place(v).through(window.proj)
            for attention in attentions[1:]:
                found = attention.in_place(found, v)
            return found.stand_in()

        return self.kept.get([p for m in (*linears, self.comp) for p in m.parameters()], compute)

    def window_macs(self, attention: nn.Module, tokens: int, active: list[int]) -> int:
        """Multiply-adds of window attention and of what stands in for it before its projection, for images of so many
        tokens, of which `active` of each image are not exempt."""
        pure = len(active) * tokens - sum(active) if 'window' in self.scope else 0
        if not pure:
            return attention.macs(len(active), tokens)
        return attention.macs(len(active), tokens, pure) + self.comp.macs(pure)

    def macs_in_one(
        self, tokens: int, active: list[int], heard: int, window: nn.Module, category: nn.Module | None = None
    ) -> dict[str, int]:
        """Multiply-adds of qkv, window and category attention with their projections, where :meth:`in_one` gives what
        pure tokens get.

        Args:
            tokens, active: tokens of an image; those of each image that are not exempt.
            heard: tokens of all images in windows that hold one that asks
                (:func:`~ppsr.ops.some_linear.of_windows_that_ask`).
            window, category: as there.
        """
        c, every, asking = window.proj.in_features, len(active) * tokens, sum(active)
        pure = every - asking if 'window' in self.scope else 0
        both = category is None or 'category' in self.scope
        macs = {'qkv': every * 3 * c * c, 'window': window.macs(len(active), tokens, *([pure] if pure else []))}
        if category is not None:
            macs['category'] = category.macs(every, active if both else len(active) * [tokens])
        if pure:
            sees = {*self.comp.sees, *(category.sees if category is not None and both else ())}
            macs['window'] += pure * (len(sees) - 1) * c * c  # in place of the projection
            if both:
                macs['qkv'] = (asking + 2 * heard) * c * c
            if category is not None and both:
                macs['category'] = category.macs(asking, active)
        return macs

    def does_without(self) -> set[str]:
        """Names of parameters that a file may have and this layer has no use for."""
        return set() if isinstance(self.comp, LinearCompensation) else {'comp.weight', 'comp.bias'}

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name in self.does_without():
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
