"""What a layer of ATD does between its self-attentions: linear layers, the depthwise convolution, the dictionary.

Each function here is first of all a few lines of PyTorch: those are the definition, and what runs in training, in other
dtypes, under autocast, torch.compile and on GPUs. Where no gradient is asked for and the ``native`` backend takes the
tensors (:mod:`ppsr.ops.dispatch`) a compiled kernel does the same in one pass: a map of 48 channels costs about as much
to read and write as to multiply, so what goes to memory in between is half of the time. The kernels are registered with
torch.library (``ppsr::linear`` …, with meta and FLOP formula), without autograd.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ppsr.ops.dispatch import choose
from ppsr.ops.native import call

__all__ = [
    'Similarity',
    'depthwise_mix',
    'dictionary_attention',
    'dictionary_refinement',
    'linear_add',
    'norm_linear',
]

MIN_CHANNELS = 16  # of the native depthwise convolution


def _native(x: Tensor, *modules: nn.Module) -> bool:
    """Whether the kernels take over: no gradient wanted, nobody rewrites the operators, float32 on the CPU; and the
    modules are PyTorch's own, without hooks (an adapter or a profiler in their place wants to be called)."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or choose(x) != 'native':
        return False
    plain = (m.__class__ in (nn.LayerNorm, nn.Linear, nn.Conv2d) and m.bias is not None for m in modules)
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    return all(plain) and not hooked and not torch.is_autocast_enabled(x.device.type)


# --- linear layers ----------------------------------------------------------------------------------------------------


@torch.library.custom_op('ppsr::linear', mutates_args=())
def _linear(
    x: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    add: Sequence[Tensor],
    gelu: bool,
) -> list[Tensor]:
    x, add = x.contiguous(), [a.contiguous() for a in add]
    out = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    parts = [p.contiguous() for pair in zip(weights, biases) for p in pair] + 2 * [None]
    norm = [p.contiguous() for p in norm] or 2 * [None]
    sizes = x.numel() // x.shape[-1], x.shape[-1], weights[0].shape[0], weights[-1].shape[0], gelu
    call('ppsr_linear', x, *norm, *parts[:4], *(add + 2 * [None])[:2], *(out + [None])[:2], eps, *sizes)
    return out


@_linear.register_fake
def _(x, norm, eps, weights, biases, add, gelu):
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


@register_flop_formula(torch.ops.ppsr.linear)
def _linear_flops(x_shape, norm_shapes, eps, weight_shapes, *args, **kwargs) -> int:
    tokens = torch.Size(x_shape[:-1]).numel()
    return 2 * tokens * sum(width * channels for width, channels in weight_shapes)


def norm_linear(x: Tensor, norm: nn.LayerNorm, *layers: nn.Linear, gelu: bool = False) -> list[Tensor]:
    """layer(norm(x)) of one or two linear layers with bias, (..., C) -> (..., out) each; then GELU, if asked for."""
    if _native(x, norm, *layers):
        parameters = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return torch.ops.ppsr.linear(x, [norm.weight, norm.bias], norm.eps, *parameters, [], gelu)
    x = norm(x)
    return [F.gelu(layer(x)) if gelu else layer(x) for layer in layers]


def linear_add(x: Tensor, layer: nn.Linear, *add: Tensor) -> Tensor:
    """layer(x) + the sum of up to two tensors of the shape of the result; (..., C) -> (..., out)."""
    if _native(x, layer):
        return torch.ops.ppsr.linear(x, [], 0.0, [layer.weight], [layer.bias], add, False)[0]
    return sum(add, start=layer(x))


# --- depthwise convolution --------------------------------------------------------------------------------------------


@torch.library.custom_op('ppsr::depthwise_mix', mutates_args=())
def _depthwise_mix(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    u = u.contiguous()
    out = torch.empty_like(u)
    call('ppsr_depthwise', u, weight.contiguous(), bias.contiguous(), out, *u.shape, weight.shape[-1])
    return out


@_depthwise_mix.register_fake
def _(u, weight, bias):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@register_flop_formula(torch.ops.ppsr.depthwise_mix)
def _depthwise_flops(u_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * torch.Size(u_shape).numel() * weight_shape[-1] ** 2


def depthwise_mix(u: Tensor, conv: nn.Conv2d) -> Tensor:
    """u + GELU(conv(u)) with a depthwise convolution, odd kernel, zeros around the map; (B, H, W, C) -> the same."""
    if _native(u, conv) and u.shape[-1] >= MIN_CHANNELS:
        return torch.ops.ppsr.depthwise_mix(u, conv.weight, conv.bias)
    return u + F.gelu(conv(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


# --- tokens and dictionary --------------------------------------------------------------------------------------------


class Similarity(NamedTuple):
    """Similarity of N tokens to the M entries of a dictionary: softmax over the entries of q·kᵀ/|q|."""

    q: Tensor  # (B, N, r)
    k: Tensor  # (B, M, r), normalised, times the scale of each entry
    matrix: Tensor | None  # (B, N, M), or None: the kernels compute it where they need it


@torch.library.custom_op('ppsr::dictionary_attention', mutates_args=())
def _dictionary_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, n, rank = q.shape
    out, category = q.new_empty(batch, n, v.shape[2]), q.new_empty(batch, n, dtype=torch.int64)
    q, k, v = q.contiguous(), _per_log_2(k), v.contiguous()
    call('ppsr_dictionary_attention', q, k, v, out, category, batch, n, rank, *v.shape[1:])
    return out, category


@_dictionary_attention.register_fake
def _(q, k, v):
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.int64)


@torch.library.custom_op('ppsr::dictionary_refinement', mutates_args=())
def _dictionary_refinement(q: Tensor, k: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    batch, entries, rank = k.shape
    n, channels = x.shape[1:]
    out = x.new_empty(batch, entries, channels)
    tensors = q.contiguous(), _per_log_2(k), x.contiguous(), weight.contiguous(), bias.contiguous(), out
    call('ppsr_dictionary_refinement', *tensors, eps, batch, n, rank, entries, channels)
    return out


@_dictionary_refinement.register_fake
def _(q, k, x, weight, bias, eps):
    return x.new_empty(*k.shape[:2], x.shape[2])


def _per_log_2(k: Tensor) -> Tensor:
    return (k * 1.4426950408889634).contiguous()  # the kernels take powers of 2


@register_flop_formula(torch.ops.ppsr.dictionary_attention)
def _attention_flops(q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    batch, n, rank = q_shape
    return 2 * batch * n * k_shape[1] * (rank + v_shape[2])


@register_flop_formula(torch.ops.ppsr.dictionary_refinement)
def _refinement_flops(q_shape, k_shape, x_shape, *args, **kwargs) -> int:
    return 2 * torch.Size(x_shape).numel() * k_shape[1]  # the similarity is an old one, though it is computed again


def dictionary_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Similarity]:
    """Every token attends to the entries of a dictionary by cosine similarity (ATD, eq. 4–6).

    Args:
        q: (B, N, r), not normalised.
        k: (B, M, r), normalised and scaled.
        v: (B, M, C).

    Returns:
        similarity·v (B, N, C); category of each token, the entry that resembles it most, (B, N) int64; the similarity.
    """
    if _native(q):
        return *torch.ops.ppsr.dictionary_attention(q, k, v), Similarity(q, k, None)
    matrix = torch.softmax(F.normalize(q, dim=-1) @ k.transpose(-2, -1), dim=-1)
    return matrix @ v, matrix.argmax(-1), Similarity(q, k, matrix)


def dictionary_refinement(similarity: Similarity, x: Tensor, norm: nn.InstanceNorm1d) -> Tensor:
    """Mean of the tokens x (B, N, C) for each entry, weighted by how they resemble it (ATD, eq. 7–8) -> (B, M, C).

    The weights are the softmax over the tokens of the similarity, normalised per entry over the tokens.
    """
    q, k, matrix = similarity
    if matrix is None:
        return torch.ops.ppsr.dictionary_refinement(q, k, x, norm.weight, norm.bias, norm.eps)
    return torch.softmax(norm(matrix.transpose(1, 2)), dim=-1) @ x
