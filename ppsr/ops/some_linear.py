"""Linear layers where not every token wants everything: a pure token asks nothing, so it needs no query, no projection.

The definitions are what :func:`norm_linear_some` and :func:`linear_some` end with: rows are gathered, worked on and put
back. Where the kernels may take over (:mod:`ppsr.ops.eligibility`), ``ppsr::norm_linear_some`` and
``ppsr::linear_some`` do the same in one pass. Inference alone: neither has a gradient.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ppsr.ops.dispatch import has_data
from ppsr.ops.eligibility import are_plain, kernels_take
from ppsr.ops.native import call, ready, require
from ppsr.ops.workspace import empty

__all__ = ['linear_some', 'norm_linear_some', 'of_windows_that_ask']


@torch.library.custom_op('ppsr::norm_linear_some', mutates_args=(), device_types='cpu')
def _norm_linear_some(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    all_weight: Tensor | None,
    all_bias: Tensor | None,
    asking: Tensor,
    heard: Tensor,
) -> tuple[Tensor, Tensor]:
    out, out_all = _outputs(x, weight, all_weight)
    c = x.shape[-1]
    require(weight.shape == (3 * c, c) and bias.numel() == 3 * c, 'weights (3·C, C)')
    require(all(mask.shape == x.shape[:-1] and mask.dtype == torch.bool for mask in (asking, heard)), 'masks (…)')
    require(norm_weight.numel() == norm_bias.numel() == c, 'a LayerNorm over the last dimension')
    x, norm_weight, norm_bias, weight, bias = ready(x, norm_weight, norm_bias, weight, bias)
    beside, width = [None, None], 0
    if all_weight is not None:
        require(all_weight.shape == (all_bias.numel(), c), 'weights that fit x')
        beside, width = ready(all_weight, all_bias), all_weight.shape[0]
    masks = asking.contiguous(), heard.contiguous()
    outputs = out, out_all if width else None
    sizes = x.numel() // c, c, c, 2 * c, width
    call(
        'ppsr_linear_some', x, norm_weight, norm_bias, weight, bias, *beside, None, None, *masks, *outputs, eps, *sizes
    )
    return out, out_all


def _outputs(x: Tensor, weight: Tensor, all_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    widths = weight.shape[0], 0 if all_weight is None else all_weight.shape[0]
    return tuple(empty(x, (*x.shape[:-1], width)) for width in widths)


@_norm_linear_some.register_fake
def _(x, norm_weight, norm_bias, eps, weight, bias, all_weight, all_bias, asking, heard):
    return _outputs(x, weight, all_weight)


@torch.library.custom_op(
    'ppsr::linear_some',
    mutates_args=('out',),
    device_types='cpu',
    schema='(Tensor(a!) out, Tensor x, Tensor weight, Tensor bias, Tensor[] add, Tensor only) -> ()',  # as in linear.py
)
def _linear_some(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, add: Sequence[Tensor], only: Tensor) -> None:
    c = x.shape[-1]
    require(weight.shape == (bias.numel(), c), 'weights that fit x')
    fits = out.shape == (*x.shape[:-1], weight.shape[0]) and out.is_contiguous()
    require(fits and len(add) <= 2 and all(a.shape == out.shape for a in add), 'up to two tensors to add, like out')
    require(only.shape == x.shape[:-1] and only.dtype == torch.bool, 'a mask (…)')
    _, x, weight, bias = ready(out, x, weight, bias)
    add = (ready(*add) + 2 * [None])[:2]
    tensors = x, None, None, weight, bias, None, None, *add, only.contiguous(), None, out, None
    call('ppsr_linear_some', *tensors, 0.0, x.numel() // c, c, weight.shape[0], 0, 0)


@_linear_some.register_fake
def _(out, x, weight, bias, add, only):
    return None


def _count(mask: Tensor) -> int:
    return int(mask.sum()) if has_data(mask) else mask.numel()  # shapes alone tell no more: the dense count


@register_flop_formula(torch.ops.ppsr.norm_linear_some, get_raw=True)
def _norm_linear_some_flops(
    x, norm_weight, norm_bias, eps, weight, bias, all_weight, all_bias, asking, heard, **_
) -> int:
    c, beside = x.shape[-1], 0 if all_weight is None else all_weight.shape[0]
    return 2 * c * (c * _count(asking) + 2 * c * _count(heard) + beside * asking.numel())


@register_flop_formula(torch.ops.ppsr.linear_some, get_raw=True)
def _linear_some_flops(out, x, weight, bias, add, only, **_) -> int:
    return 2 * weight.numel() * _count(only)


def of_windows_that_ask(pure: Tensor, window_size: int, shift: int) -> Tensor:
    """Which tokens are in a window that holds a token that asks: pure (B, H, W) bool -> the same. Nobody reads keys and
    values of the others.

    Args:
        window_size, shift: those of :func:`~ppsr.ops.window_attention.window_attention`.
    """
    asking = ~pure
    if shift:
        asking = asking.roll((-shift, -shift), (1, 2))
    b, h, w = asking.shape
    windows = asking.view(b, h // window_size, window_size, w // window_size, window_size).any(4).any(2)
    heard = windows[:, :, None, :, None].expand(-1, -1, window_size, -1, window_size).reshape(b, h, w)
    return heard.roll((shift, shift), (1, 2)) if shift else heard


def norm_linear_some(
    x: Tensor, norm: nn.LayerNorm, qkv: nn.Linear, beside: nn.Linear | None, asking: Tensor, heard: Tensor
) -> tuple[Tensor, Tensor]:
    """What :func:`~ppsr.ops.linear.norm_linear` gives for two layers, as far as it is wanted.

    Args:
        x: (…, C).
        norm, qkv: C to C, C to 3·C channels.
        beside: C to any number of channels, for all tokens, or None.
        asking: (…) bool, the tokens that want the first C outputs of `qkv`.
        heard: (…) bool, those that want the others.

    Returns:
        (…, 3·C), of which the rest has no meaning and need not be finite; (…, out), or an empty tensor.
    """
    linears = [qkv] if beside is None else [qkv, beside]
    fits = are_plain(nn.LayerNorm, norm) and norm.normalized_shape == x.shape[-1:] and are_plain(nn.Linear, *linears)
    parameters = [p for layer in linears for p in (layer.weight, layer.bias)]
    if fits and kernels_take(x, norm.weight, norm.bias, *parameters):
        weights = (*parameters, None, None)[:4]
        return torch.ops.ppsr.norm_linear_some(x, norm.weight, norm.bias, norm.eps, *weights, asking, heard)
    z = norm(x)
    c = x.shape[-1]
    out = z.new_zeros(*x.shape[:-1], 3 * c)
    for mask, part in ((asking, slice(c)), (heard, slice(c, None))):
        index = mask.flatten().nonzero().squeeze(1)
        rows = F.linear(z.flatten(0, -2)[index], qkv.weight[part], qkv.bias[part])
        out.flatten(0, -2)[:, part].index_copy_(0, index, rows)
    return out, z.new_empty(*x.shape[:-1], 0) if beside is None else beside(z)


def linear_some(out: Tensor, x: Tensor, layer: nn.Linear, only: Tensor, *add: Tensor) -> Tensor:
    """:func:`~ppsr.ops.linear.linear_add` for some tokens, written into `out`, whose other rows stay as they are.

    Args:
        out: (…, out), contiguous; may be one of those added.
        x: (…, C).
        only: (…) bool.
        add: like `out`.
    """
    if are_plain(nn.Linear, layer) and len(add) <= 2 and kernels_take(out, x, layer.weight, layer.bias, *add):
        torch.ops.ppsr.linear_some(out, x, layer.weight, layer.bias, add, only)
        return out
    index = only.flatten().nonzero().squeeze(1)
    rows = layer(x.flatten(0, -2)[index])
    flat = out.flatten(0, -2)
    return flat.index_copy_(0, index, sum((a.flatten(0, -2)[index] for a in add), start=rows)).view(out.shape)
