"""What stands between the self-attentions in training: kernels with a backward of their own.

``ppsr::linear_training``, ``depthwise_training``, ``dictionary_training`` and ``refinement_training`` do what
:mod:`ppsr.ops.linear`, :mod:`ppsr.ops.depthwise` and :mod:`ppsr.ops.dictionary` define, where
:func:`ppsr.ops.eligibility.kernels_teach` lets them. Their backward is one pass each over the tokens (two for the
refinement): normalised tokens and what a GELU was given are computed again and not kept.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ppsr.ops.native import call, ready, require

__all__ = ['depthwise_training', 'dictionary_training', 'linear_training', 'refinement_training']


# a call costs less than one of torch.library.custom_op, which would let a second import replace the first
if (_before := vars(torch.ops.ppsr).get('training_library')) is not None:
    _before._destroy()
_library = torch.ops.ppsr.training_library = torch.library.Library('ppsr', 'FRAGMENT')


def _operator(schema: str) -> Callable[[Callable], Callable]:
    """Decorator: registers ppsr::<schema> on the CPU."""

    def register(function: Callable) -> Callable:
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(schema.split('(')[0], function, 'CPU')
        return function

    return register


def _learns(name: str, setup_context: Callable, backward: Callable) -> None:
    """Registers a backward, as torch.library.register_autograd does; that one goes through the schema at each call,
    which takes longer than a small layer."""
    operator = getattr(torch.ops.ppsr, name).default

    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = operator(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = {'forward': staticmethod(forward), 'backward': staticmethod(backward)}
    _library.impl(name, type(name, (torch.autograd.Function,), methods).apply, 'Autograd')


def _like(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


# ------------------------------------------------------------------ linear layers

_LAYERS = (
    'Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, Tensor bias, Tensor? weight2, '
    'Tensor? bias2'
)


@_operator(f'linear_training({_LAYERS}, Tensor? add, Tensor? add2, bool gelu) -> (Tensor, Tensor)')
def _linear(x, norm_weight, norm_bias, eps, weight, bias, weight2, bias2, add, add2, gelu):
    lists = [
        [t for t in pair if t is not None] for pair in ((norm_weight, norm_bias), (weight, weight2), (bias, bias2))
    ]
    norm, weights, biases = lists
    out = torch.ops.ppsr.linear(x, norm, eps, weights, biases, [a for a in (add, add2) if a is not None], gelu)
    return out[0], out[1] if weight2 is not None else x.new_empty(0)


@torch.library.register_fake('ppsr::linear_training')
def _(x, norm_weight, norm_bias, eps, weight, bias, weight2, bias2, add, add2, gelu):
    return _output(x, weight), x.new_empty(0) if weight2 is None else _output(x, weight2)


def _output(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_operator(
    f'linear_training_backward(Tensor grad, Tensor? grad2, {_LAYERS}, bool gelu) -> ({", ".join(7 * ["Tensor"])})'
)
def _linear_backward(grad, grad2, x, norm_weight, norm_bias, eps, weight, bias, weight2, bias2, gelu):
    channels = x.shape[-1]
    for given, w, b in ((grad, weight, bias), (grad2, weight2, bias2)):
        if w is not None:
            require(w.shape == (b.numel(), channels), 'weights that fit x')
            require(given.shape == (*x.shape[:-1], b.numel()), 'gradients like the outputs')
    require(all(p is None or p.numel() == channels for p in (norm_weight, norm_bias)), 'a LayerNorm of the channels')
    given = [grad, grad2, x, norm_weight, norm_bias, weight, bias, weight2, bias2]
    given = [None if t is None else ready(t)[0] for t in given]
    grads = [None if t is None else torch.empty_like(t) for t in given[2:]]
    sizes = x.numel() // channels, channels, len(weight), 0 if weight2 is None else len(weight2)
    call('ppsr_linear_backward', *given, *grads, eps, *sizes, gelu)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@torch.library.register_fake('ppsr::linear_training_backward')
def _(grad, grad2, x, norm_weight, norm_bias, eps, weight, bias, weight2, bias2, gelu):
    tensors = x, norm_weight, norm_bias, weight, bias, weight2, bias2
    return tuple(x.new_empty(0) if t is None else _like(t)[0] for t in tensors)


def _linear_context(ctx, inputs, output):
    x, norm_weight, norm_bias, ctx.eps, weight, bias, weight2, bias2, add, add2, ctx.gelu = inputs
    ctx.additions = add is not None, add2 is not None
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, weight2, bias2)


def _linear_autograd(ctx, grad, grad2):
    x, norm_weight, norm_bias, weight, bias, weight2, bias2 = ctx.saved_tensors
    grad = torch.zeros_like(_output(x, weight)) if grad is None else grad
    if weight2 is None:
        grad2 = None
    elif grad2 is None:
        grad2 = torch.zeros_like(_output(x, weight2))
    layers = x, norm_weight, norm_bias, ctx.eps, weight, bias, weight2, bias2
    of_x, *others = torch.ops.ppsr.linear_training_backward(grad, grad2, *layers, ctx.gelu)
    of_norm = others[:2] if norm_weight is not None else 2 * [None]
    of_layers = others[2:] if weight2 is not None else [*others[2:4], None, None]
    return of_x, *of_norm, None, *of_layers, *(grad if added else None for added in ctx.additions), None


_learns('linear_training', _linear_context, _linear_autograd)


def _linear_macs(x_shape, weight_shape, weight2_shape) -> int:
    layers = (shape for shape in (weight_shape, weight2_shape) if shape is not None)
    return torch.Size(x_shape[:-1]).numel() * sum(torch.Size(shape).numel() for shape in layers)


@register_flop_formula(torch.ops.ppsr.linear_training)
def _(x, norm_weight, norm_bias, eps, weight, bias, weight2, *args, **kwargs) -> int:
    return 2 * _linear_macs(x, weight, weight2)


@register_flop_formula(torch.ops.ppsr.linear_training_backward)
def _(grad, grad2, x, norm_weight, norm_bias, eps, weight, bias, weight2, bias2, gelu, *args, **kwargs) -> int:
    return (6 if gelu else 4) * _linear_macs(
        x, weight, weight2
    )  # for x, for the weights; with a GELU the forward again


def linear_training(
    x: Tensor, norm: nn.LayerNorm | None, *layers: nn.Linear, add: Sequence[Tensor] = (), gelu: bool = False
) -> list[Tensor]:
    """GELU(layer(norm(x))) + additions for one or two linear layers on the same tokens, with a backward.

    Args:
        x: (..., C) float32 on the CPU.
        norm: over C, or None.
        layers: one or two, from C channels.
        add: up to two tensors like the first result, to be added to it; not with a GELU.

    Returns:
        (..., out) for each layer.
    """
    of_norm = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    of_layers = [p for layer in layers for p in (layer.weight, layer.bias)] + [None, None]
    out = torch.ops.ppsr.linear_training(x, *of_norm, *of_layers[:4], *(*add, None, None)[:2], gelu)
    return list(out[: len(layers)])


# ------------------------------------------------------------------ depthwise convolution


@_operator('depthwise_training(Tensor u, Tensor weight, Tensor bias) -> (Tensor, Tensor)')
def _depthwise(u, weight, bias):
    channels, kernel = u.shape[-1], weight.shape[-1]
    require(u.dim() == 4 and bias.numel() == channels, 'maps (B, H, W, C)')
    require(weight.shape == (channels, 1, kernel, kernel) and kernel % 2 == 1, 'a depthwise weight, square and odd')
    u, weight, bias = ready(u, weight, bias)
    out, slope = torch.empty_like(u), torch.empty_like(u)
    call('ppsr_depthwise_training', u, weight, bias, out, slope, *u.shape, kernel)
    return out, slope


@torch.library.register_fake('ppsr::depthwise_training')
def _(u, weight, bias):
    return tuple(_like(u, u))


@_operator(
    'depthwise_training_backward(Tensor grad, Tensor u, Tensor slope, Tensor weight) -> (Tensor, Tensor, Tensor)'
)
def _depthwise_backward(grad, u, slope, weight):
    channels, kernel = u.shape[-1], weight.shape[-1]
    require(u.dim() == 4 and grad.shape == slope.shape == u.shape, 'maps (B, H, W, C)')
    require(weight.shape == (channels, 1, kernel, kernel) and kernel % 2 == 1, 'a depthwise weight, square and odd')
    grad, u, slope, weight = ready(grad, u, slope, weight)
    grads = *_like(u, weight), weight.new_empty(channels)
    call('ppsr_depthwise_backward', grad, u, slope, weight, *grads, *u.shape, kernel)
    return grads


@torch.library.register_fake('ppsr::depthwise_training_backward')
def _(grad, u, slope, weight):
    return *_like(u, weight), weight.new_empty(weight.shape[0])


def _depthwise_context(ctx, inputs, output):
    u, weight, _ = inputs
    ctx.save_for_backward(u, output[1], weight)
    ctx.mark_non_differentiable(output[1])


def _depthwise_autograd(ctx, grad, _):
    return torch.ops.ppsr.depthwise_training_backward(grad, *ctx.saved_tensors)


_learns('depthwise_training', _depthwise_context, _depthwise_autograd)


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


# ------------------------------------------------------------------ tokens and dictionary

STATISTICS, LANES = 6, 16  # rows that the refinement keeps for its backward, filled up to a multiple of LANES


@_operator('dictionary_training(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor)')
def _dictionary(q, k, v):
    batch, n, rank = q.shape
    entries, channels = v.shape[1:]
    require(k.shape == (batch, entries, rank) and v.shape[0] == batch, 'q (B, N, r), k (B, M, r), v (B, M, C)')
    tensors, (out, category, matrix) = ready(q, k, v), _dictionary_outputs(q, v)
    call('ppsr_dictionary_training', *tensors, out, category, matrix, batch, n, rank, entries, channels)
    return out, category, matrix


@torch.library.register_fake('ppsr::dictionary_training')
def _(q, k, v):
    return _dictionary_outputs(q, v)


def _dictionary_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens = q.shape[:2]
    category = q.new_empty(tokens, dtype=torch.int64)
    return q.new_empty(*tokens, v.shape[2]), category, q.new_empty(*tokens, v.shape[1])


@_operator(
    'dictionary_training_backward(Tensor grad, Tensor? grad_matrix, Tensor q, Tensor k, Tensor v, Tensor matrix) -> '
    '(Tensor, Tensor, Tensor)'
)
def _dictionary_backward(grad, grad_matrix, q, k, v, matrix):
    batch, n, rank = q.shape
    entries, channels = v.shape[1:]
    require(k.shape == (batch, entries, rank) and v.shape[0] == batch, 'q (B, N, r), k (B, M, r), v (B, M, C)')
    fits = grad.shape == (batch, n, channels) and matrix.shape == (batch, n, entries)
    require(fits and (grad_matrix is None or grad_matrix.shape == matrix.shape), 'gradients like the outputs')
    tensors = [None if t is None else ready(t)[0] for t in (grad, grad_matrix, q, k, v, matrix)]
    grads = _like(q, k, v)
    call('ppsr_dictionary_backward', *tensors, *grads, batch, n, rank, entries, channels)
    return tuple(grads)


@torch.library.register_fake('ppsr::dictionary_training_backward')
def _(grad, grad_matrix, q, k, v, matrix):
    return tuple(_like(q, k, v))


def _dictionary_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[2])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # a matrix that nobody refines by


def _dictionary_autograd(ctx, grad, _, grad_matrix):
    q, k, v, matrix = ctx.saved_tensors
    grad = torch.zeros_like(_dictionary_outputs(q, v)[0]) if grad is None else grad
    return torch.ops.ppsr.dictionary_training_backward(grad, grad_matrix, q, k, v, matrix)


_learns('dictionary_training', _dictionary_context, _dictionary_autograd)


@_operator('refinement_training(Tensor matrix, Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)')
def _refinement(matrix, x, weight, bias, eps):
    batch, n, entries = matrix.shape
    require(x.shape[:2] == (batch, n) and x.dim() == 3, 'a matrix (B, N, M) and x (B, N, C)')
    require(weight.numel() == bias.numel() == entries, 'a normalisation of M entries')
    tensors, (out, statistics) = ready(matrix, x, weight), _refinement_outputs(matrix, x)
    call('ppsr_refinement_training', *tensors, out, statistics, eps, batch, n, entries, x.shape[2])
    return out, statistics


@torch.library.register_fake('ppsr::refinement_training')
def _(matrix, x, weight, bias, eps):
    return _refinement_outputs(matrix, x)


def _refinement_outputs(matrix: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, entries = matrix.shape
    wide = (entries + LANES - 1) // LANES * LANES
    return x.new_empty(batch, entries, x.shape[2]), x.new_empty(batch, STATISTICS, wide)


@_operator(
    'refinement_training_backward(Tensor grad, Tensor matrix, Tensor x, Tensor weight, Tensor out, Tensor statistics) '
    '-> (Tensor, Tensor, Tensor)'
)
def _refinement_backward(grad, matrix, x, weight, out, statistics):
    batch, n, entries = matrix.shape
    require(x.shape[:2] == (batch, n) and x.dim() == 3 and weight.numel() == entries, 'a matrix (B, N, M), x (B, N, C)')
    shapes = [t.shape for t in _refinement_outputs(matrix, x)]
    require(grad.shape == out.shape == shapes[0] and statistics.shape == shapes[1], 'gradients like the output')
    grads = _like(matrix, x, weight)
    tensors = ready(grad, matrix, x, weight, out, statistics)
    call('ppsr_refinement_backward', *tensors, *grads, batch, n, entries, x.shape[2])
    return tuple(grads)


@torch.library.register_fake('ppsr::refinement_training_backward')
def _(grad, matrix, x, weight, out, statistics):
    return tuple(_like(matrix, x, weight))


def _refinement_context(ctx, inputs, output):
    matrix, x, weight, _, _ = inputs
    ctx.save_for_backward(matrix, x, weight, *output)
    ctx.mark_non_differentiable(output[1])


def _refinement_autograd(ctx, grad, _):
    of_matrix, of_x, of_weight = torch.ops.ppsr.refinement_training_backward(grad, *ctx.saved_tensors)
    return of_matrix, of_x, of_weight, torch.zeros_like(of_weight), None  # a softmax does not see the bias


_learns('refinement_training', _refinement_context, _refinement_autograd)


@register_flop_formula(torch.ops.ppsr.dictionary_training)
def _(q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    batch, n, rank = q_shape
    return 2 * batch * n * k_shape[1] * (rank + v_shape[2])


@register_flop_formula(torch.ops.ppsr.dictionary_training_backward)
def _(grad_shape, grad_matrix_shape, q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    batch, n, rank = q_shape
    return 4 * batch * n * k_shape[1] * (rank + v_shape[2])


@register_flop_formula(torch.ops.ppsr.refinement_training)
def _(matrix_shape, x_shape, *args, **kwargs) -> int:
    return 2 * torch.Size(x_shape).numel() * matrix_shape[2]


@register_flop_formula(torch.ops.ppsr.refinement_training_backward)
def _(grad_shape, matrix_shape, x_shape, *args, **kwargs) -> int:
    return 4 * torch.Size(x_shape).numel() * matrix_shape[2]


def dictionary_training(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of tokens to a dictionary with a backward: q (B, N, r), k (B, M, r), v (B, M, C), float32 on the CPU ->
    output (B, N, C), category (B, N) int64, similarity (B, N, M)"""
    return torch.ops.ppsr.dictionary_training(q, k, v)


def refinement_training(matrix: Tensor, x: Tensor, norm: nn.InstanceNorm1d) -> Tensor:
    """Softmax over the tokens of the normalised similarity (B, N, M), times x (B, N, C), with a backward -> (B, M, C)

    float32 on the CPU; norm over the M entries, without statistics of its own.
    """
    return torch.ops.ppsr.refinement_training(matrix, x, norm.weight, norm.bias, norm.eps)[0]
