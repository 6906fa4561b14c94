"""Shifted-window attention as one operator.

:func:`window_attention` is what a network calls; the partition into windows, the cyclic shift and the way back are
inside the operator, so that a backend may turn them into addresses instead of copies. Registered with torch.library as
``ppsr::window_attention`` with its backward (meta, autograd, FLOP formula). An implementation runs below autograd, so
every backend brings its backward. Beside the output a forward returns ``lse`` (B, h, H, W) float32 (float64 for
float64), the natural logarithm of the sum of each token's exp(logit); that of a pure token is not read. A backward may
be given another backend's.

Without ``fill`` a forward may leave out the rows of pure tokens, without ``with_lse`` lse: the compiled kernels do.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ppsr.ops.dispatch import has_data, select

__all__ = ['attention_macs', 'window_attention']


@torch.library.custom_op('ppsr::window_attention', mutates_args=())
def _forward(
    qkv: Tensor,
    bias_table: Tensor,
    pure: Tensor | None,
    num_heads: int,
    window_size: int,
    shift: int,
    fill: bool = True,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    return select('window_attention', qkv).forward(qkv, bias_table, pure, num_heads, window_size, shift, fill, with_lse)


@_forward.register_fake
def _(qkv, bias_table, pure, num_heads, window_size, shift, fill=True, with_lse=True):
    batch, h, w, c3 = qkv.shape
    out = qkv.new_empty(batch, h, w, c3 // 3)
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return out, qkv.new_empty(batch, num_heads, h, w, dtype=wide)


@torch.library.custom_op('ppsr::window_attention_backward', mutates_args=())
def _backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_table: Tensor,
    pure: Tensor | None,
    num_heads: int,
    window_size: int,
    shift: int,
) -> tuple[Tensor, Tensor]:
    backend = select('window_attention', qkv)
    return backend.backward(grad_out, qkv, out, lse, bias_table, pure, num_heads, window_size, shift)


@_backward.register_fake
def _(grad_out, qkv, out, lse, bias_table, pure, num_heads, window_size, shift):
    return torch.empty_like(qkv), torch.empty_like(bias_table)


def _setup_context(ctx, inputs, output):
    qkv, bias_table, pure, ctx.num_heads, ctx.window_size, ctx.shift, *_ = inputs
    ctx.save_for_backward(qkv, *output, bias_table, pure)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad_out, _):
    qkv, out, lse, bias_table, pure = ctx.saved_tensors
    grad_qkv, grad_table = torch.ops.ppsr.window_attention_backward(
        grad_out.contiguous(), qkv, out, lse, bias_table, pure, ctx.num_heads, ctx.window_size, ctx.shift
    )
    return grad_qkv, grad_table, None, None, None, None, None, None


torch.library.register_autograd('ppsr::window_attention', _autograd, setup_context=_setup_context)


def attention_macs(tokens: int, channels: int, window_size: int) -> int:
    """Multiply-adds of q·kᵀ and A·v: each of the `tokens` that ask attends to the window_size² tokens of its window."""
    return 2 * tokens * window_size**2 * channels


def _asking(qkv: Tensor, pure: Tensor | None) -> int:
    tokens = qkv.shape[:3].numel()
    # shapes alone tell no more: the dense count
    return tokens - int(pure.sum()) if pure is not None and has_data(pure) else tokens


@register_flop_formula(torch.ops.ppsr.window_attention, get_raw=True)
def _flops(qkv, bias_table, pure, num_heads, window_size, *args, **kwargs) -> int:
    return 2 * attention_macs(_asking(qkv, pure), qkv.shape[3] // 3, window_size)


@register_flop_formula(torch.ops.ppsr.window_attention_backward, get_raw=True)
def _flops_backward(grad_out, qkv, out, lse, bias_table, pure, num_heads, window_size, *args, **kwargs) -> int:
    # five products where the forward has two
    return 5 * attention_macs(_asking(qkv, pure), qkv.shape[3] // 3, window_size)


def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    *,
    num_heads: int,
    window_size: int,
    shift: int = 0,
    pure: Tensor | None = None,
    fill: bool = True,
) -> Tensor:
    """Self-attention inside the windows of a map (Swin, sec. 3.2; ATD uses it as SW-MSA).

    With a shift the window grid is moved by (shift, shift) cyclically, and pairs of tokens that were not neighbours
    before (they meet only by wrapping around a border) get −100 on their logit. Per head:
    softmax(q·kᵀ/√d + bias [− 100])·v. Only the reference backend computes such pairs; the others leave them out,
    which changes their weight of about e^−100 ≈ 4e-44 (a denormal number, and arithmetic on those is slow) to 0.

    A pure token asks nothing: its output is zeros, for the caller to fill with what it gets instead. It stays where it
    is as key and value for the other tokens of its window.

    Args:
        qkv: (B, H, W, 3·C), H and W multiples of window_size, heads contiguous inside q, k and v. Any float dtype.
        bias_table: ((2·window_size − 1)², num_heads), row (Δy + ws − 1)·(2·ws − 1) + (Δx + ws − 1) holds the bias for
            query minus key offset (Δy, Δx); may need a gradient.
        num_heads: C is divided into this many heads of d channels.
        window_size: side of a window.
        shift: 0 ≤ shift < window_size.
        pure: (B, H, W) bool, True = asks nothing, or None when every token asks.
        fill: whether there have to be zeros in the rows of the pure tokens; False saves writing them where nobody will
            read them.

    Returns:
        (B, H, W, C), dtype of qkv, tokens where they were, not yet projected; for the pure ones zeros, or without
        `fill` anything.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit; the message names it.
    """
    if num_heads < 1 or window_size < 1:
        raise ValueError(f'num_heads and window_size must be at least 1, got {num_heads} and {window_size}')
    if qkv.dim() != 4 or qkv.shape[3] % (3 * num_heads) or not qkv.is_floating_point() or qkv.numel() == 0:
        raise ValueError(
            f'qkv must be floating and (B, H, W, 3·C), none of them 0, C a multiple of num_heads={num_heads}, '
            f'got {qkv.dtype} {tuple(qkv.shape)}'
        )
    if qkv.shape[1] % window_size or qkv.shape[2] % window_size:
        raise ValueError(f'H and W must be multiples of window_size={window_size}, got {tuple(qkv.shape[1:3])}')
    table_shape = ((2 * window_size - 1) ** 2, num_heads)
    if bias_table.shape != table_shape or not bias_table.is_floating_point() or bias_table.device != qkv.device:
        raise ValueError(
            f'bias_table must be floating {table_shape} on {qkv.device} for window_size={window_size} and '
            f'num_heads={num_heads}, got {bias_table.dtype} {tuple(bias_table.shape)} on {bias_table.device}'
        )
    if not 0 <= shift < window_size:
        raise ValueError(f'shift must lie in [0, window_size={window_size}), got {shift}')
    if pure is not None and (pure.shape != qkv.shape[:3] or pure.dtype != torch.bool or pure.device != qkv.device):
        raise ValueError(
            f'pure must be bool {tuple(qkv.shape[:3])} on {qkv.device}, '
            f'got {pure.dtype} {tuple(pure.shape)} on {pure.device}'
        )
    with_lse = torch.is_grad_enabled() and (qkv.requires_grad or bias_table.requires_grad)
    # backends get rows side by side in memory; no copy for the output of a linear layer
    sizes = num_heads, window_size, shift
    return torch.ops.ppsr.window_attention(qkv.contiguous(), bias_table, pure, *sizes, fill, with_lse)[0]
