"""Masked category attention as one operator.

:func:`category_attention` is what a network calls. Behind it stand ``torch.ops.ppsr.category_attention`` and its
backward, registered with torch.library (meta, autograd, FLOP formula), so that torch.compile, FlopCounterMode and
activation checkpointing see one operator. An implementation runs below autograd, so every backend brings its backward.

What the two operators pass on, beside the arguments that :func:`category_attention` explains: ``keep``, whether a pure
token gets its value vector or zeros; ``lse`` (B, h, N) float32 (float64 for float64), the natural logarithm of the sum
of each token's exp(logit); ``order`` (B, N) int32, the tokens in sorted order, the pure ones last; ``counts`` (B,)
int32, how many are active. lse of a pure token is not read. A backward may be given another backend's forward.

Without ``fill`` a forward may leave out the rows of pure tokens, without ``with_lse`` lse: the compiled kernels do.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ppsr.ops.dispatch import has_data, select

__all__ = ['COMPENSATIONS', 'attention_macs', 'category_attention']

# What a pure token gets instead of attention: its own value ('value'; 'bypass' differs only after the operator, where
# it skips the projection), or nothing.
COMPENSATIONS = ('value', 'bypass', 'zero')
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@torch.library.custom_op('ppsr::category_attention', mutates_args=())
def _forward(
    qkv: Tensor,
    category: Tensor,
    pure: Tensor | None,
    scale: Tensor,
    num_heads: int,
    category_size: int,
    keep: bool,
    fill: bool = True,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend = select('category_attention', qkv)
    return backend.forward(qkv, category, pure, scale, num_heads, category_size, keep, fill, with_lse)


@_forward.register_fake
def _(qkv, category, pure, scale, num_heads, category_size, keep, fill=True, with_lse=True):
    batch, n, c3 = qkv.shape
    out = qkv.new_empty(batch, n, c3 // 3)
    lse = qkv.new_empty(batch, num_heads, n, dtype=torch.float64 if qkv.dtype == torch.float64 else torch.float32)
    order = qkv.new_empty(batch, n, dtype=torch.int32)
    counts = qkv.new_empty(batch, dtype=torch.int32)
    return out, lse, order, counts


@torch.library.custom_op('ppsr::category_attention_backward', mutates_args=())
def _backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    order: Tensor,
    counts: Tensor,
    scale: Tensor,
    num_heads: int,
    category_size: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    backend = select('category_attention', qkv)
    return backend.backward(grad_out, qkv, out, lse, order, counts, scale, num_heads, category_size, keep)


@_backward.register_fake
def _(grad_out, qkv, out, lse, order, counts, scale, num_heads, category_size, keep):
    return torch.empty_like(qkv), torch.empty_like(scale)


def _setup_context(ctx, inputs, output):
    qkv, _, _, scale, ctx.num_heads, ctx.category_size, ctx.keep, *_ = inputs
    ctx.save_for_backward(qkv, *output, scale)
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx, grad_out, *_):
    qkv, out, lse, order, counts, scale = ctx.saved_tensors
    grad_qkv, grad_scale = torch.ops.ppsr.category_attention_backward(
        grad_out.contiguous(), qkv, out, lse, order, counts, scale, ctx.num_heads, ctx.category_size, ctx.keep
    )
    return grad_qkv, None, None, grad_scale, None, None, None, None, None


torch.library.register_autograd('ppsr::category_attention', _autograd, setup_context=_setup_context)


def attention_macs(active: Tensor | list[int], channels: int, category_size: int) -> int:
    """Multiply-adds of the two products (q·kᵀ and A·v) for images with `active` non-pure tokens each.

    A token attends to the min(active, category_size) tokens of its group: 2·group·channels multiply-adds. The queries
    that fill up the last group are never computed and are not counted.
    """
    counts = active.tolist() if isinstance(active, Tensor) else active
    return 2 * channels * sum(n * min(n, category_size) for n in counts)


@register_flop_formula(torch.ops.ppsr.category_attention, get_raw=True)
def _flops(qkv, category, pure, scale, num_heads, category_size, *args, **kwargs) -> int:
    batch, n, c3 = qkv.shape
    if pure is None or not has_data(pure):
        active = [n] * batch  # shapes alone tell no more: the dense count
    else:
        active = n - pure.sum(1)
    return 2 * attention_macs(active, c3 // 3, category_size)


@register_flop_formula(torch.ops.ppsr.category_attention_backward, get_raw=True)
def _flops_backward(grad_out, qkv, out, lse, order, counts, scale, num_heads, category_size, *args, **kwargs) -> int:
    # five products where the forward has two: q·kᵀ again, dO·vᵀ, Pᵀ·dO, dS·k, dSᵀ·q
    active = counts if has_data(counts) else [qkv.shape[1]] * qkv.shape[0]
    return 5 * attention_macs(active, qkv.shape[2] // 3, category_size)


def category_attention(
    qkv: Tensor,
    category: Tensor,
    scale: Tensor,
    *,
    num_heads: int,
    category_size: int,
    pure: Tensor | None = None,
    compensation: str = 'value',
    fill: bool = True,
) -> Tensor:
    """Self-attention among the active tokens of like category (ATD, sec. 3.3; Pure-Pass exempts the pure tokens).

    The active tokens of an image are sorted by category (stable) and cut into groups of g = min(active, category_size)
    in sorted order. Positions past the end of the last group are filled with the last tokens in reverse order (they
    serve as keys and values a second time). Inside a group each head computes softmax(scale · q·kᵀ)·v. Groups never
    mix images. A pure token gives no query, key or value to any group.

    Args:
        qkv: (B, N, 3·C), queries, keys and values side by side, heads contiguous inside each. Any float dtype.
        category: (B, N) integer, the category of each token, 0 ≤ category.
        scale: one element, what the logits are multiplied by (exp of ATD's clamped logit_scale); may need a gradient.
        num_heads: C is divided into this many heads.
        category_size: size of a group, g above.
        pure: (B, N) bool, True = exempt, or None when no token is.
        compensation: what a pure token gets: 'value' and 'bypass' give its own value vector, 'zero' gives zeros.
        fill: whether pure tokens have to get that; False saves writing it where nobody will read it.

    Returns:
        (B, N, C), dtype of qkv, tokens in their original order, not yet projected; without `fill` the rows of pure
        tokens hold anything.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit; the message names it.
    """
    if num_heads < 1:
        raise ValueError(f'num_heads must be at least 1, got {num_heads}')
    if qkv.dim() != 3 or qkv.shape[2] % (3 * num_heads) or not qkv.is_floating_point() or qkv.numel() == 0:
        raise ValueError(
            f'qkv must be floating and (B, N, 3·C), none of them 0, C a multiple of num_heads={num_heads}, '
            f'got {qkv.dtype} {tuple(qkv.shape)}'
        )
    if category.shape != qkv.shape[:2] or category.dtype not in _INTEGERS:
        raise ValueError(
            f'category must be integer {tuple(qkv.shape[:2])}, got {category.dtype} {tuple(category.shape)}'
        )
    if pure is not None and (pure.shape != qkv.shape[:2] or pure.dtype != torch.bool):
        raise ValueError(f'pure must be bool {tuple(qkv.shape[:2])}, got {pure.dtype} {tuple(pure.shape)}')
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ValueError(f'scale must hold one floating element, got {scale.dtype} {tuple(scale.shape)}')
    for name, x in (('category', category), ('pure', pure), ('scale', scale)):
        if x is not None and x.device != qkv.device:
            raise ValueError(f'{name} must be on the device of qkv, {qkv.device}, got {x.device}')
    if category_size < 1:
        raise ValueError(f'category_size must be at least 1, got {category_size}')
    if compensation not in COMPENSATIONS:
        raise ValueError(f'compensation must be one of {", ".join(COMPENSATIONS)}, got {compensation!r}')
    flags = compensation != 'zero', fill, torch.is_grad_enabled() and (qkv.requires_grad or scale.requires_grad)
    # backends get rows side by side in memory; no copy for the output of a linear layer
    qkv = qkv.contiguous()
    return torch.ops.ppsr.category_attention(qkv, category, pure, scale, num_heads, category_size, *flags)[0]
