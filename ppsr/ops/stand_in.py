"""What pure tokens get in place of attention, written into the attention's output: rows of maps, or a linear function
of a token's normalised input z and of the mean of that around it, A z + B mean5(z) + c.

The definition is :func:`fill_pure` with :func:`mean5`. Where the kernels may take over (:mod:`ppsr.ops.eligibility`),
``ppsr::linear_stand_in`` does the linear one in one pass over the rows of the map that hold a pure token.
Shapes: map (B, H, W, C), P pure tokens in row-major order.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ppsr.ops.dispatch import has_data
from ppsr.ops.eligibility import are_plain, kernels_take
from ppsr.ops.native import call, ready, require

__all__ = ['fill_pure', 'linear_stand_in', 'mean5']


@torch.library.custom_op(
    'ppsr::linear_stand_in',
    mutates_args=('out',),
    device_types='cpu',
    schema='(Tensor(a!) out, Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, Tensor bias,'
    ' Tensor pure, bool own, bool around, Tensor[] add) -> ()',  # torch 2.4 does not understand the annotations
)
def _linear_stand_in(
    out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    pure: Tensor,
    own: bool,
    around: bool,
    add: Sequence[Tensor],
) -> None:
    c, sees = x.shape[-1], own + around
    require(x.dim() == 4 and out.shape == x.shape and out.is_contiguous(), 'maps (B, H, W, C) of one shape')
    require(pure.shape == x.shape[:3] and pure.dtype == torch.bool, 'a mask (B, H, W)')
    require(norm_weight.numel() == norm_bias.numel() == c, 'a LayerNorm over the last dimension')
    require(sees > 0 and weight.shape == (c, sees * c) and bias.numel() == c, 'weights (C, C) or (C, 2·C)')
    require(len(add) <= 2 and all(a.shape == x.shape for a in add), 'up to two tensors to add, like the map')
    _, x, norm_weight, norm_bias, weight, bias = ready(out, x, norm_weight, norm_bias, weight, bias)
    add = (ready(*add) + 2 * [None])[:2]
    parameters = norm_weight, norm_bias, weight, bias
    call('ppsr_linear_stand_in', x, *parameters, *add, pure.contiguous(), out, eps, own, around, *x.shape)


@_linear_stand_in.register_fake
def _(out, x, norm_weight, norm_bias, eps, weight, bias, pure, own, around, add):
    return None


@register_flop_formula(torch.ops.ppsr.linear_stand_in, get_raw=True)
def _linear_stand_in_flops(out, x, norm_weight, norm_bias, eps, weight, bias, pure, *args, **kwargs) -> int:
    return 2 * weight.numel() * (int(pure.sum()) if has_data(pure) else pure.numel())


def mean5(x: Tensor) -> Tensor:
    """Mean of the 5×5 neighbourhood of each token, at the border of what there is of it: (B, H, W, C) -> the same."""
    x = x.permute(0, 3, 1, 2)  # rows of five, then columns: what there is of a neighbourhood is a rectangle
    x = F.avg_pool2d(x, (1, 5), stride=1, padding=(0, 2), count_include_pad=False)
    return F.avg_pool2d(x, (5, 1), stride=1, padding=(2, 0), count_include_pad=False).permute(0, 2, 3, 1)


def fill_pure(out: Tensor, pure: Tensor, maps: Callable[[], Sequence[Tensor]], rows: Callable[..., Tensor]) -> Tensor:
    """What stands in for attention, in the rows of its pure tokens.

    Args:
        out: (B, H, W, C), the attention's output; without gradients it is written to.
        pure: (B, H, W) bool.
        maps: gives maps (B, H, W, …), of which the rows of the pure tokens are taken; not called if there are none.
        rows: makes (P, C) of those rows.

    Returns:
        (B, H, W, C). Under torch.compile, where a number of rows that depends on the data would break the graph,
        `rows` sees all tokens.
    """
    if torch.compiler.is_compiling():
        return torch.where(pure[..., None], rows(*maps()).to(out.dtype), out)
    index = pure.flatten().nonzero().squeeze(1)
    if not (index.numel() or torch.is_grad_enabled()):  # with gradients, those of nothing are zeros and not absent
        return out
    found = rows(*(m.flatten(0, 2)[index] for m in maps())).to(out.dtype)
    flat = out.flatten(0, 2)
    if torch.is_grad_enabled():
        return flat.index_copy(0, index, found).view(out.shape)
    flat.index_copy_(0, index, found)
    return out


def linear_stand_in(
    out: Tensor,
    pure: Tensor,
    x: Tensor,
    norm: nn.LayerNorm,
    weight: Tensor,
    bias: Tensor,
    *add: Tensor,
    own: bool = True,
    around: bool = True,
) -> Tensor:
    """:func:`fill_pure` with A z + B mean5(z) + c of z = norm(x), plus the rows of what is to be added, maps like x.

    Args:
        weight: (C, 2·C) = [A, B]; (C, C) where the token itself (`own`) or the mean (`around`) plays no part.
        bias: (C,) = c.
    """
    fits = are_plain(nn.LayerNorm, norm) and norm.normalized_shape == x.shape[-1:] and out.is_contiguous()
    if fits and len(add) <= 2 and kernels_take(x, out, norm.weight, norm.bias, weight, bias, *add):
        parameters = norm.weight, norm.bias, norm.eps, weight, bias
        torch.ops.ppsr.linear_stand_in(out, x, *parameters, pure, own, around, add)
        return out

    def maps():  # its type is not written: torch 2.4 compiles no tuple[…] inside of a function
        z = norm(x)
        return [*([z] if own else []), *([mean5(z)] if around else []), *add]

    def rows(*found):
        seen = own + around
        return sum(found[seen:], start=F.linear(torch.cat(found[:seen], -1), weight, bias))

    return fill_pure(out, pure, maps, rows)
