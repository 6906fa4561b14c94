"""Linear layers and the depthwise convolution in training: kernels with a backward of their own.

``ppsr::linear_training`` and ``ppsr::depthwise_training`` do what :mod:`ppsr.ops.linear` and :mod:`ppsr.ops.depthwise`
define, where :func:`ppsr.ops.eligibility.kernels_teach` lets them. Their backward is one pass each: the normalised
tokens and what a GELU was given are computed again and not kept, except for the slope of the convolution's GELU, a map.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ppsr.ops.native import call, ready, require

__all__ = ['depthwise_training', 'linear_training']

# ------------------------------------------------------------------ linear layers


@torch.library.custom_op(
    'ppsr::linear_training',
    mutates_args=(),
    device_types='cpu',
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
    return torch.ops.ppsr.linear(x, norm, eps, weights, biases, add, gelu)


@_linear.register_fake
def _(x, norm, eps, weights, biases, add, gelu):
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


@torch.library.custom_op(
    'ppsr::linear_training_backward',
    mutates_args=(),
    device_types='cpu',
    schema='(Tensor[] grads, Tensor x, Tensor[] norm, float eps, Tensor[] weights, Tensor[] biases, bool gelu)'
    ' -> Tensor[]',
)
def _linear_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gelu: bool,
) -> list[Tensor]:
    out = _like(x, *norm, *weights, *biases)
    require(0 < len(weights) <= 2 and len(grads) == len(biases) == len(weights), 'one or two layers')
    require(len(norm) in (0, 2) and all(p.numel() == x.shape[-1] for p in norm), 'a LayerNorm over the last dimension')
    require(all(w.shape == (b.numel(), x.shape[-1]) for w, b in zip(weights, biases)), 'weights that fit x')
    shapes = [(*x.shape[:-1], weight.shape[0]) for weight in weights]
    require(all(g.shape == shape for g, shape in zip(grads, shapes)), 'gradients like the outputs')

    def two(tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Ready for C, a null pointer for each that is missing."""
        return (ready(*tensors) + 2 * [None])[:2]

    def by_layer(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor | None]:
        return [t for pair in zip(two(first), two(second)) for t in pair]

    (x,), layers = ready(x), len(weights)
    grad_x, grad_norm, more = out[0], out[1 : 1 + len(norm)], out[1 + len(norm) :]
    sizes = x.numel() // x.shape[-1], x.shape[-1], weights[0].shape[0], weights[1].shape[0] if layers > 1 else 0
    given = *two(grads), x, *two(norm), *by_layer(weights, biases)
    call(
        'ppsr_linear_backward',
        *(*given, grad_x, *two(grad_norm), *by_layer(more[:layers], more[layers:])),
        *(eps, *sizes, gelu),
    )
    return out


def _like(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


@_linear_backward.register_fake
def _(grads, x, norm, eps, weights, biases, gelu):
    return _like(x, *norm, *weights, *biases)


def _linear_context(ctx, inputs, output):
    x, norm, ctx.eps, weights, biases, add, ctx.gelu = inputs
    ctx.counts = len(norm), len(weights), len(add)
    ctx.save_for_backward(x, *norm, *weights, *biases)


def _linear_autograd(ctx, grads):
    norms, layers, adds = ctx.counts
    x, *more = ctx.saved_tensors
    norm, weights, biases = more[:norms], more[norms : norms + layers], more[norms + layers :]
    shapes = [(*x.shape[:-1], weight.shape[0]) for weight in weights]
    grads = [x.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, shapes)]
    out = torch.ops.ppsr.linear_training_backward(grads, x, norm, ctx.eps, weights, biases, ctx.gelu)
    of_norm, of_weights, of_biases = out[1 : 1 + norms], out[1 + norms : 1 + norms + layers], out[1 + norms + layers :]
    return out[0], of_norm, None, of_weights, of_biases, adds * [grads[0]], None


torch.library.register_autograd('ppsr::linear_training', _linear_autograd, setup_context=_linear_context)


def _linear_macs(x_shape, weight_shapes) -> int:
    return torch.Size(x_shape[:-1]).numel() * sum(width * channels for width, channels in weight_shapes)


@register_flop_formula(torch.ops.ppsr.linear_training)
def _(x_shape, norm_shapes, eps, weight_shapes, *args, **kwargs) -> int:
    return 2 * _linear_macs(x_shape, weight_shapes)


@register_flop_formula(torch.ops.ppsr.linear_training_backward)
def _(grad_shapes, x_shape, norm_shapes, eps, weight_shapes, bias_shapes, gelu, *args, **kwargs) -> int:
    return (6 if gelu else 4) * _linear_macs(x_shape, weight_shapes)  # of the tokens, of the weights; the forward again


def linear_training(
    x: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    add: Sequence[Tensor] = (),
    gelu: bool = False,
) -> list[Tensor]:
    """GELU(norm(x) weightᵀ + bias) + additions for one or two linear layers on the same tokens, with a backward.

    Args:
        x: (..., C) float32 on the CPU.
        norm: weight and bias (C) of a LayerNorm with `eps`, or nothing.
        weights, biases: (out, C) and (out) of each layer.
        add: up to two tensors like the first result, to be added to it; not with a GELU.

    Returns:
        (..., out) for each layer.
    """
    return torch.ops.ppsr.linear_training(x, norm, eps, weights, biases, add, gelu)


# ------------------------------------------------------------------ depthwise convolution


@torch.library.custom_op('ppsr::depthwise_training', mutates_args=(), device_types='cpu')
def _depthwise(u: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    channels, kernel = u.shape[-1], weight.shape[-1]
    require(u.dim() == 4 and bias.numel() == channels, 'maps (B, H, W, C)')
    require(weight.shape == (channels, 1, kernel, kernel) and kernel % 2 == 1, 'a depthwise weight, square and odd')
    u, weight, bias = ready(u, weight, bias)
    out, slope = torch.empty_like(u), torch.empty_like(u)
    call('ppsr_depthwise_training', u, weight, bias, out, slope, *u.shape, kernel)
    return out, slope


@_depthwise.register_fake
def _(u, weight, bias):
    return tuple(_like(u, u))


@torch.library.custom_op('ppsr::depthwise_training_backward', mutates_args=(), device_types='cpu')
def _depthwise_backward(grad: Tensor, u: Tensor, slope: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    channels, kernel = u.shape[-1], weight.shape[-1]
    require(u.dim() == 4 and grad.shape == slope.shape == u.shape, 'maps (B, H, W, C)')
    require(weight.shape == (channels, 1, kernel, kernel) and kernel % 2 == 1, 'a depthwise weight, square and odd')
    grad, u, slope, weight = ready(grad, u, slope, weight)
    grads = *_like(u, weight), weight.new_empty(channels)
    call('ppsr_depthwise_backward', grad, u, slope, weight, *grads, *u.shape, kernel)
    return grads


@_depthwise_backward.register_fake
def _(grad, u, slope, weight):
    return *_like(u, weight), weight.new_empty(weight.shape[0])


def _depthwise_context(ctx, inputs, output):
    u, weight, _ = inputs
    ctx.save_for_backward(u, output[1], weight)
    ctx.mark_non_differentiable(output[1])


def _depthwise_autograd(ctx, grad, _):
    return torch.ops.ppsr.depthwise_training_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd('ppsr::depthwise_training', _depthwise_autograd, setup_context=_depthwise_context)


@register_flop_formula(torch.ops.ppsr.depthwise_training)
def _(u_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * torch.Size(u_shape).numel() * weight_shape[-1] ** 2


@register_flop_formula(torch.ops.ppsr.depthwise_training_backward)
def _(grad_shape, u_shape, slope_shape, weight_shape, *args, **kwargs) -> int:
    return 4 * torch.Size(u_shape).numel() * weight_shape[-1] ** 2


def depthwise_training(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """u + GELU(conv(u)) with a backward: u (B, H, W, C) float32 on the CPU, weight (C, 1, k, k), bias (C), k odd, zeros
    around the map -> (B, H, W, C)"""
    return torch.ops.ppsr.depthwise_training(u, weight, bias)[0]
