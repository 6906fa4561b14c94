"""Linear layers with what stands beside them: a LayerNorm in front, a GELU or additions behind, rows of a table beside
the outputs, two layers at once.

The definition is what :func:`norm_linear` and :func:`linear_add` end with, a few lines of PyTorch. Where the kernels
may take over (:mod:`ppsr.ops.eligibility`), ``ppsr::linear`` does the same in one pass.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ppsr.ops.eligibility import are_plain, kernels_take, kernels_teach
from ppsr.ops.native import call, ready, require
from ppsr.ops.training_layers import linear_training
from ppsr.ops.workspace import empty

__all__ = ['linear_add', 'norm_linear', 'norm_linear_beside']


@torch.library.custom_op(
    'ppsr::linear',
    mutates_args=(),
    device_types='cpu',
    schema='(Tensor x, Tensor[] norm, float eps, Tensor[] weights, Tensor[] biases, Tensor[] add, bool gelu,'
    ' Tensor? rows=None, Tensor? row=None) -> Tensor[]',  # torch 2.4 does not understand the annotations
)
def _linear(
    x: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    add: Sequence[Tensor],
    gelu: bool,
    rows: Tensor | None = None,
    row: Tensor | None = None,
) -> list[Tensor]:
    out = _outputs(x, weights, rows)
    require(0 < len(weights) <= 2 and len(biases) == len(weights) and len(norm) in (0, 2), 'one or two layers')
    require(len(add) <= 2 and all(a.shape == out[0].shape for a in add), 'up to two tensors to add, like the result')
    require(all(w.shape == (b.numel(), x.shape[-1]) for w, b in zip(weights, biases)), 'weights that fit x')
    require(all(p.numel() == x.shape[-1] for p in norm), 'a LayerNorm over the last dimension')
    columns = 0
    if rows is not None:
        fits = rows.dim() == 2 and row is not None and row.shape == x.shape[:-1] and row.dtype == torch.int64
        require(fits and not add, 'rows (M, columns) with the number of one for each row of x, nothing to add')
        (rows,), row, columns = ready(rows), row.contiguous(), rows.shape[1]
        least, most = (n.item() for n in row.aminmax())
        require(least >= 0 and most < len(rows), f'numbers of rows from 0 to {len(rows) - 1}')

    def two(tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Ready for C, a null pointer for each that is missing."""
        return (ready(*tensors) + 2 * [None])[:2]

    (x,), (weight, weight2), (bias, bias2) = ready(x), two(weights), two(biases)
    widths = weight.shape[0], weight2.shape[0] if weights[1:] else 0, columns
    sizes = x.numel() // x.shape[-1], x.shape[-1], *widths, gelu
    call('ppsr_linear', x, *two(norm), weight, bias, weight2, bias2, *two(add), rows, row, *two(out), eps, *sizes)
    return out


def _outputs(x: Tensor, weights: Sequence[Tensor], rows: Tensor | None) -> list[Tensor]:
    widths = [weight.shape[0] for weight in weights]
    widths[:1] = [width + (0 if rows is None else rows.shape[-1]) for width in widths[:1]]
    return [empty(x, (*x.shape[:-1], width)) for width in widths]


@_linear.register_fake
def _(x, norm, eps, weights, biases, add, gelu, rows=None, row=None):
    return _outputs(x, weights, rows)


@register_flop_formula(torch.ops.ppsr.linear)
def _linear_flops(x_shape, norm_shapes, eps, weight_shapes, *args, **kwargs) -> int:
    tokens = torch.Size(x_shape[:-1]).numel()
    return 2 * tokens * sum(width * channels for width, channels in weight_shapes)


def norm_linear(x: Tensor, norm: nn.LayerNorm, *layers: nn.Linear, gelu: bool = False) -> list[Tensor]:
    """layer(norm(x)) of each linear layer, (..., C) -> (..., out); then GELU, if asked for. One pass for up to two."""
    fits = are_plain(nn.LayerNorm, norm) and norm.normalized_shape == x.shape[-1:] and are_plain(nn.Linear, *layers)
    if fits and len(layers) <= 2 and all(layer.in_features == x.shape[-1] for layer in layers):
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        if kernels_take(x, norm.weight, norm.bias, *weights, *biases):
            return torch.ops.ppsr.linear(x, [norm.weight, norm.bias], norm.eps, weights, biases, [], gelu)
        if kernels_teach(x, norm.weight, norm.bias, *weights, *biases):
            return linear_training(x, norm, *layers, gelu=gelu)
    x = norm(x)
    return [F.gelu(layer(x)) if gelu else layer(x) for layer in layers]


def norm_linear_beside(x: Tensor, norm: nn.LayerNorm, layer: nn.Linear, rows: Tensor, row: Tensor) -> Tensor:
    """GELU(layer(norm(x))), and beside it in a row the row of a table that a token names.

    Args:
        x: (..., C).
        norm, layer: C to C, C to out channels.
        rows: (M, D), the table.
        row: (...) int64 in 0…M − 1.

    Returns:
        (..., out + D).
    """
    if (
        are_plain(nn.LayerNorm, norm)
        and norm.normalized_shape == x.shape[-1:]
        and are_plain(nn.Linear, layer)
        and layer.in_features == x.shape[-1]
        and rows.dtype == x.dtype
        and row.dtype == torch.int64
        and kernels_take(x, norm.weight, norm.bias, layer.weight, layer.bias, rows)
    ):
        parameters = [norm.weight, norm.bias], norm.eps, [layer.weight], [layer.bias]
        return torch.ops.ppsr.linear(x, *parameters, [], True, rows, row)[0]
    (u,) = norm_linear(x, norm, layer, gelu=True)
    return torch.cat([u, rows.to(u.dtype)[row]], -1)


def linear_add(x: Tensor, layer: nn.Linear, *add: Tensor) -> Tensor:
    """layer(x) + the sum of some tensors, (..., C) -> (..., out). In one pass for up to two of the result's shape."""
    if are_plain(nn.Linear, layer) and layer.in_features == x.shape[-1] and len(add) <= 2:
        shape = *x.shape[:-1], layer.out_features
        if all(a.shape == shape for a in add):
            if kernels_take(x, layer.weight, layer.bias, *add):
                return torch.ops.ppsr.linear(x, [], 0.0, [layer.weight], [layer.bias], add, False)[0]
            if kernels_teach(x, layer.weight, layer.bias, *add):
                return linear_training(x, None, layer, add=add)[0]
    return sum(add, start=layer(x))
