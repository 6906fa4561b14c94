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
LOG2_E = 1.4426950408889634
CPU = dict(mutates_args=(), device_types='cpu')


def _free() -> bool:
    """Whether operators may be fused: no gradient wanted, nobody else rewrites them."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled('cpu'))


def _native(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: float32 on the CPU, with something in them, no subclass of Tensor."""
    if not _free() or any(type(t) not in (Tensor, nn.Parameter) or not t.numel() for t in tensors):
        return False
    alike = all(t.dtype == tensors[0].dtype and t.device == tensors[0].device for t in tensors)
    return alike and choose(tensors[0]) == 'native'


def _is(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether the modules are PyTorch's own with weight and bias, nothing around them: an adapter in their place, a
    hook or a patched forward (profilers, offloading) wants to be called."""
    return _free() and all(
        type(m) is kind
        and type(m.weight) is type(m.bias) is nn.Parameter
        and not (m._forward_hooks or m._forward_pre_hooks or 'forward' in vars(m))
        for m in modules
    )


# --- linear layers ----------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    'ppsr::linear',
    **CPU,
    schema='(Tensor x, Tensor[] norm, float eps, Tensor[] weights, Tensor[] biases, Tensor[] add, bool gelu)'
    ' -> Tensor[]',  # torch 2.4 does not understand the annotations
)
def _linear(
    x: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    add: Sequence[Tensor],
    gelu: bool,
) -> list[Tensor]:
    out = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    _require(0 < len(weights) <= 2 and len(biases) == len(weights) and len(norm) in (0, 2), 'one or two layers')
    _require(len(add) <= 2 and all(a.shape == out[0].shape for a in add), 'up to two tensors to add, like the result')
    _require(all(w.shape == (b.numel(), x.shape[-1]) for w, b in zip(weights, biases)), 'weights that fit x')
    _require(all(p.numel() == x.shape[-1] for p in norm), 'a LayerNorm over the last dimension')

    def two(tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Ready for C, a null pointer for each that is missing."""
        return (_ready(*tensors) + 2 * [None])[:2]

    (x,), (weight, weight2), (bias, bias2) = _ready(x), two(weights), two(biases)
    sizes = x.numel() // x.shape[-1], x.shape[-1], weight.shape[0], weight2.shape[0] if weights[1:] else 0, gelu
    call('ppsr_linear', x, *two(norm), weight, bias, weight2, bias2, *two(add), *two(out), eps, *sizes)
    return out


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f'the operator takes {what}')


def _ready(*tensors: Tensor) -> list[Tensor]:
    """For C: contiguous, float32."""
    _require(all(t.dtype == torch.float32 and t.numel() for t in tensors), 'float32 tensors that are not empty')
    return [t.contiguous() for t in tensors]


@_linear.register_fake
def _(x, norm, eps, weights, biases, add, gelu):
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


@register_flop_formula(torch.ops.ppsr.linear)
def _linear_flops(x_shape, norm_shapes, eps, weight_shapes, *args, **kwargs) -> int:
    tokens = torch.Size(x_shape[:-1]).numel()
    return 2 * tokens * sum(width * channels for width, channels in weight_shapes)


def norm_linear(x: Tensor, norm: nn.LayerNorm, *layers: nn.Linear, gelu: bool = False) -> list[Tensor]:
    """layer(norm(x)) of each linear layer, (..., C) -> (..., out); then GELU, if asked for. One pass for up to two."""
    fits = _is(nn.LayerNorm, norm) and norm.normalized_shape == x.shape[-1:] and _is(nn.Linear, *layers)
    if fits and len(layers) <= 2 and all(layer.in_features == x.shape[-1] for layer in layers):
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        if _native(x, norm.weight, norm.bias, *weights, *biases):
            return torch.ops.ppsr.linear(x, [norm.weight, norm.bias], norm.eps, weights, biases, [], gelu)
    x = norm(x)
    return [F.gelu(layer(x)) if gelu else layer(x) for layer in layers]


def linear_add(x: Tensor, layer: nn.Linear, *add: Tensor) -> Tensor:
    """layer(x) + the sum of some tensors, (..., C) -> (..., out). In one pass for up to two of the result's shape."""
    if _is(nn.Linear, layer) and layer.in_features == x.shape[-1] and len(add) <= 2:
        shape = *x.shape[:-1], layer.out_features
        if all(a.shape == shape for a in add) and _native(x, layer.weight, layer.bias, *add):
            return torch.ops.ppsr.linear(x, [], 0.0, [layer.weight], [layer.bias], add, False)[0]
    return sum(add, start=layer(x))


# --- depthwise convolution --------------------------------------------------------------------------------------------


@torch.library.custom_op('ppsr::depthwise_mix', **CPU)
def _depthwise_mix(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    channels, kernel = u.shape[-1], weight.shape[-1]
    _require(u.dim() == 4 and channels >= MIN_CHANNELS and bias.numel() == channels, 'maps (B, H, W, C ≥ 16)')
    _require(weight.shape == (channels, 1, kernel, kernel) and kernel % 2 == 1, 'a depthwise weight, square and odd')
    u, weight, bias = _ready(u, weight, bias)
    out = torch.empty_like(u)
    call('ppsr_depthwise', u, weight, bias, out, *u.shape, kernel)
    return out


@_depthwise_mix.register_fake
def _(u, weight, bias):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@register_flop_formula(torch.ops.ppsr.depthwise_mix)
def _depthwise_flops(u_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * torch.Size(u_shape).numel() * weight_shape[-1] ** 2


def depthwise_mix(u: Tensor, conv: nn.Conv2d) -> Tensor:
    """u + GELU(conv(u)) with a depthwise convolution, odd kernel, zeros around the map; (B, H, W, C) -> the same."""
    channels, side = u.shape[-1], conv.kernel_size[0]
    expected = dict(
        groups=channels, in_channels=channels, out_channels=channels, kernel_size=(side, side), stride=(1, 1)
    )
    expected |= dict(padding=(side // 2, side // 2), dilation=(1, 1), padding_mode='zeros')
    fits = _is(nn.Conv2d, conv) and side % 2 == 1 and all(getattr(conv, k) == v for k, v in expected.items())
    if fits and channels >= MIN_CHANNELS and _native(u, conv.weight, conv.bias):
        return torch.ops.ppsr.depthwise_mix(u, conv.weight, conv.bias)
    return u + F.gelu(conv(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


# --- tokens and dictionary --------------------------------------------------------------------------------------------


class Similarity(NamedTuple):
    """Similarity of N tokens to the M entries of a dictionary: softmax over the entries of q·kᵀ/|q|."""

    q: Tensor  # (B, N, r)
    k: Tensor  # (B, M, r), normalised, times the scale of each entry
    matrix: Tensor | None  # (B, N, M), or None: the kernels compute it where they need it


@torch.library.custom_op('ppsr::dictionary_attention', **CPU)
def _dictionary_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, n, rank = q.shape
    _require(k.shape == (batch, v.shape[1], rank) and v.shape[0] == batch, 'q (B, N, r), k (B, M, r), v (B, M, C)')
    out, category = q.new_empty(batch, n, v.shape[2]), q.new_empty(batch, n, dtype=torch.int64)
    q, k, v = _ready(q, k * LOG2_E, v)  # the kernels take powers of 2
    call('ppsr_dictionary_attention', q, k, v, out, category, batch, n, rank, *v.shape[1:])
    return out, category


@_dictionary_attention.register_fake
def _(q, k, v):
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.int64)


@torch.library.custom_op('ppsr::dictionary_refinement', **CPU)
def _dictionary_refinement(q: Tensor, k: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    batch, entries, rank = k.shape
    n, channels = x.shape[1:]
    _require(q.shape == (batch, n, rank) and x.shape[0] == batch, 'q (B, N, r), k (B, M, r), x (B, N, C)')
    _require(weight.numel() == bias.numel() == entries, 'a normalisation of M entries')
    out = x.new_empty(batch, entries, channels)
    tensors = _ready(q, k * LOG2_E, x, weight, bias)
    call('ppsr_dictionary_refinement', *tensors, out, eps, batch, n, rank, entries, channels)
    return out


@_dictionary_refinement.register_fake
def _(q, k, x, weight, bias, eps):
    return x.new_empty(*k.shape[:2], x.shape[2])


@register_flop_formula(torch.ops.ppsr.dictionary_attention)
def _attention_flops(q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    batch, n, rank = q_shape
    return 2 * batch * n * k_shape[1] * (rank + v_shape[2])


@register_flop_formula(torch.ops.ppsr.dictionary_refinement)
def _refinement_flops(q_shape, k_shape, x_shape, *args, **kwargs) -> int:
    return 2 * torch.Size(x_shape).numel() * k_shape[1]  # the similarity is an old one, though it is computed again


def _similarity(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(F.normalize(q, dim=-1) @ k.transpose(-2, -1), dim=-1)


def dictionary_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Similarity]:
    """Every token attends to the entries of a dictionary by cosine similarity (ATD, eq. 4–6).

    Args:
        q: (B, N, r), not normalised.
        k: (B, M, r), normalised and scaled.
        v: (B, M, C).

    Returns:
        similarity·v (B, N, C); category of each token, the entry that resembles it most, (B, N) int64; the similarity.
    """
    if q.shape[0] == k.shape[0] == v.shape[0] and _native(q, k, v):
        return *torch.ops.ppsr.dictionary_attention(q, k, v), Similarity(q, k, None)
    matrix = _similarity(q, k)
    return matrix @ v, matrix.argmax(-1), Similarity(q, k, matrix)


def dictionary_refinement(similarity: Similarity, x: Tensor, norm: nn.InstanceNorm1d) -> Tensor:
    """Mean of the tokens x (B, N, C) for each entry, weighted by how they resemble it (ATD, eq. 7–8) -> (B, M, C).

    The weights are the softmax over the tokens of the similarity, normalised per entry over the tokens.
    """
    q, k, matrix = similarity
    if matrix is None:
        fits = _is(nn.InstanceNorm1d, norm) and not norm.track_running_stats and norm.num_features == k.shape[1]
        if fits and x.shape[:2] == q.shape[:2] and _native(x, norm.weight, norm.bias):
            return torch.ops.ppsr.dictionary_refinement(q, k, x, norm.weight, norm.bias, norm.eps)
        matrix = _similarity(q, k)
    return torch.softmax(norm(matrix.transpose(1, 2)), dim=-1) @ x
