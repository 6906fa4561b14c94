"""Our operators and masks in terms of ONNX's own operators, for torch.onnx's table of translations.

What a file computes is what :mod:`ppsr.ops` and :mod:`ppsr.masks` define:

- category attention: TopK of the keys category·N + position, the pure tokens behind all others; of the groups only the
  ⌈active / category_size⌉ first ones are gathered and computed, a number that the graph finds for each picture;
- window attention: every token's answer is computed, and those of pure tokens are replaced;
- the colour mask: integers that float32 holds exactly, so that ties are ties as in :mod:`ppsr.masks.pure_pass`; the
  variance mask: in float64.

Functions here are called while a graph is traced: each `op.X(…)` adds a node.
"""

import numpy as np
import torch
from onnx import TensorProto, numpy_helper
from onnxscript import opset20 as op
from torch import Tensor, nn

from ppsr.errors import UserError
from ppsr.masks import Both, Gradient, PixelMask, PurePass, Variance
from ppsr.masks.gradient import gradient_mask
from ppsr.masks.pure_pass import CENTER_STEPS, PIXEL_STEPS, color_centers, pure_mask
from ppsr.masks.variance import variance_mask

__all__ = ['OPSET', 'TRANSLATIONS', 'exportable_mask']

OPSET = 20
FAR = 1 << 30  # behind the key of every token that is not pure; fits runtimes that have 32-bit integers only
NEVER = -1e9  # added to the logit of a key that is not there
APART = -100.0  # added to the logit of a pair that only wrapping around a border has brought together


# ------------------------------------------------------------------------------------------------------------- words


def constant(value, dtype=np.float32):
    """A constant; of int64 unless it is to be something else, see `scalar` and `ints`."""
    return op.Constant(value=numpy_helper.from_array(np.asarray(value, dtype)))


def scalar(value: int):
    return constant(value, np.int64)


def ints(*values: int):
    return constant(values, np.int64)


def shape(*parts):
    """One shape from numbers and (1,) int64 tensors."""
    return op.Concat(*(ints(part) if isinstance(part, int) else part for part in parts), axis=0)


def size(x, axis: int):
    """(1,) int64"""
    return op.Shape(x, start=axis, end=axis + 1)


def count_up(end):
    """0, 1, … end − 1; end is (1,) int64 or a scalar"""
    return op.Range(scalar(0), op.Squeeze(end), scalar(1))


def as_int(x):
    return op.Cast(x, to=TensorProto.INT64)


def as_float(x):
    return op.Cast(x, to=TensorProto.FLOAT)


def split_qkv(x, perm: list[int]):
    """Transpose so that the dimension of 3 comes first, and take it apart."""
    return [op.Squeeze(part, ints(0)) for part in op.Split(op.Transpose(x, perm=perm), num_outputs=3, axis=0)]


def with_columns(x, columns):
    """x (b, h, S, d) with further columns (b, 1, S, e), the same for every head -> (b, h, S, d + e)"""
    return op.Concat(x, op.Expand(columns, op.Concat(op.Shape(x, end=3), size(columns, 3), axis=0)), axis=-1)


def attend(q, k, v, bias=None):
    """softmax(q·kᵀ + bias)·v of (b, h, S, d)"""
    logits = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(logits if bias is None else op.Add(logits, bias), axis=-1), v)


# ------------------------------------------------------------------------------------------------ category attention


def category_attention(qkv, category, pure, scale, num_heads: int, category_size: int, keep: bool, *_):
    """The first output of ppsr::category_attention; the others serve its backward and are not computed."""
    batch, n, c3, g = size(qkv, 0), size(qkv, 1), size(qkv, 2), category_size
    position = op.Unsqueeze(count_up(n), ints(0))  # (1, N)
    key = op.Add(op.Mul(as_int(category), n), position)  # (B, N)
    if pure is None:
        counts = op.Expand(op.Unsqueeze(n, ints(1)), shape(batch, 1))  # (B, 1), active tokens
    else:
        key = op.Add(key, op.Mul(as_int(pure), scalar(FAR)))
        counts = op.ReduceSum(as_int(op.Not(pure)), ints(1), keepdims=1)
    _, order = op.TopK(key, n, axis=1, largest=0, sorted=1)  # (B, N), the token at each sorted position

    # P = G·g places in groups; those past the last active token hold the last ones again, in reverse order
    most = op.Squeeze(op.ReduceMax(counts, ints(0), keepdims=0))
    groups = op.Max(op.Div(op.Add(most, scalar(g - 1)), scalar(g)), scalar(1))
    places = op.Mul(groups, scalar(g))
    place = op.Unsqueeze(count_up(places), ints(0))  # (1, P)
    there = op.Less(place, counts)  # (B, P)
    member = op.Where(there, place, op.Sub(op.Mul(counts, scalar(2)), op.Add(place, scalar(1))))
    # past the groups of an image with fewer than others have, or than one has: anything, nobody looks there
    member = op.Min(op.Max(member, scalar(0)), op.Sub(n, scalar(1)))
    image = op.Unsqueeze(count_up(batch), ints(1))  # (B, 1)
    token = op.Add(op.GatherElements(order, member, axis=1), op.Mul(image, n))
    rows = op.Gather(op.Reshape(qkv, shape(-1, c3)), token, axis=0)  # (B, P, 3C)

    rows = op.Reshape(rows, shape(op.Reshape(op.Mul(op.Squeeze(batch), groups), ints(1)), g, 3, num_heads, -1))
    q, k, v = split_qkv(rows, [2, 0, 3, 1, 4])  # (B·G, h, g, d)
    # the places of an image with less than one group of tokens are no keys; a column more of q and k says so
    is_key = op.Or(there, op.GreaterOrEqual(counts, scalar(g)))
    bias = op.Reshape(op.Where(is_key, constant(0), constant(NEVER)), ints(-1, 1, g, 1))
    q = op.Mul(q, op.Reshape(scale, ints(1)))
    x = attend(with_columns(q, constant([[[[1]]]])), with_columns(k, bias), v)
    channels = op.Div(c3, ints(3))
    x = op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), shape(-1, channels))  # (B·P, C)

    # back: each token's sorted position
    rank = op.ScatterElements(order, order, op.Expand(position, op.Shape(order)), axis=1)
    row = op.Add(op.Min(rank, op.Sub(places, scalar(1))), op.Mul(image, places))
    out = op.Gather(x, row, axis=0)  # (B, N, C)
    if pure is not None:
        instead = op.Slice(qkv, op.Mul(channels, ints(2)), c3, ints(2)) if keep else constant(0)
        out = op.Where(op.Unsqueeze(pure, ints(2)), instead, out)
    return out, op.Identity(out), op.Identity(order), op.Identity(counts)


# -------------------------------------------------------------------------------------------------- window attention


def roll(x, shift: int):
    """(B, H, W, C), both sides rolled towards the front by `shift`, which may be negative."""
    for axis in (1, 2):
        start, end, axes = ints(shift), ints(np.iinfo(np.int64).max), ints(axis)
        x = op.Concat(op.Slice(x, start, end, axes), op.Slice(x, ints(0), start, axes), axis=axis)
    return x


def border_columns(rows, windows, s: int, shift: int):
    """Further columns of q and k (n, 1, S, 4), whose products are 0 for pairs that were neighbours before the roll, and
    at most APART for the others: in the last row (column) of windows, tokens before and behind the border.

    With a = 1 behind the border and 0 before it, a pair is apart where a(1 − a') + (1 − a)a' is 1.
    """
    behind = constant(np.arange(s) >= s - shift)

    def mark(count, axes: list[int]):
        last = op.Equal(count_up(count), op.Sub(count, ints(1)))  # (count,)
        a = as_float(op.And(op.Unsqueeze(last, ints(1)), op.Cast(behind, to=TensorProto.BOOL)))  # (count, s)
        a = op.Expand(op.Unsqueeze(a, ints(*axes)), shape(rows, windows, s, s))
        return op.Reshape(a, ints(-1, 1, s * s, 1))

    a, b = mark(rows, [1, 3]), mark(windows, [0, 2])
    not_a, not_b = op.Sub(constant(1), a), op.Sub(constant(1), b)
    return op.Mul(op.Concat(a, not_a, b, not_b, axis=-1), constant(APART)), op.Concat(not_a, a, not_b, b, axis=-1)


def position_bias(table, s: int):
    """((2s − 1)², h) -> (1, h, S, S)"""
    y, x = (part.flatten() for part in np.meshgrid(np.arange(s), np.arange(s), indexing='ij'))
    row = y * (2 * s - 1) + x  # of query minus key, the row of the table is a difference of these
    index = op.Sub(constant(row[:, None] + 2 * s * (s - 1), np.int64), constant(row[None, :], np.int64))
    return op.Unsqueeze(op.Transpose(op.Gather(table, index, axis=0), perm=[2, 0, 1]), ints(0))


def window_attention(qkv, bias_table, pure, num_heads: int, window_size: int, shift: int, *_):
    """The first output of ppsr::window_attention; the other serves its backward and is not computed."""
    s, c3 = window_size, int(qkv.shape[3])
    c = c3 // 3
    batch, height, width = (size(qkv, axis) for axis in range(3))
    rows, windows = op.Div(height, ints(s)), op.Div(width, ints(s))  # of windows; windows in a row
    x = roll(qkv, shift) if shift else qkv
    x = op.Transpose(op.Reshape(x, shape(-1, s, windows, s * c3)), perm=[0, 2, 1, 3])
    x = op.Reshape(x, ints(-1, s * s, 3, num_heads, c // num_heads))
    q, k, v = split_qkv(x, [2, 0, 3, 1, 4])  # (B·n, h, S, d)
    q = op.Mul(q, constant((c // num_heads) ** -0.5))
    if shift:
        of_q, of_k = border_columns(rows, windows, s, shift)  # (n, 1, S, 4)
        q = with_columns(q, op.Tile(of_q, shape(batch, 1, 1, 1)))
        k = with_columns(k, op.Tile(of_k, shape(batch, 1, 1, 1)))
    x = attend(q, k, v, position_bias(bias_table, s))
    x = op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), shape(-1, windows, s, s * c))
    x = op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), shape(batch, height, width, c))
    x = roll(x, -shift) if shift else x
    if pure is not None:
        x = op.Where(op.Unsqueeze(pure, ints(3)), constant(0), x)
    return x, op.Identity(x)


# ------------------------------------------------------------------------------------------------------------- masks
# Each is an operator of torch, for the exporter alone, that runs as ppsr.masks says and is translated here.


@torch.library.custom_op('ppsr::colour_mask', mutates_args=())
def _colour_mask(lq: Tensor, num_centers: int, window_size: int, shift: int, fuse: bool) -> Tensor:
    return pure_mask(lq, num_centers, window_size, shift, fuse)


@torch.library.custom_op('ppsr::variance_mask', mutates_args=())
def _variance_mask(lq: Tensor, threshold: float, window_size: int) -> Tensor:
    return variance_mask(lq, threshold, window_size)


@torch.library.custom_op('ppsr::gradient_mask', mutates_args=())
def _gradient_mask(lq: Tensor, threshold: float) -> Tensor:
    return gradient_mask(lq, threshold)


@_colour_mask.register_fake
@_gradient_mask.register_fake
@_variance_mask.register_fake
def _(lq, *settings):
    return lq.new_empty(lq.shape[0], *lq.shape[2:], dtype=torch.bool)


class _Colour(nn.Module):
    def __init__(self, mask: PurePass):
        super().__init__()
        self.settings = mask.num_centers, mask.window_size, mask.shift, mask.fuse

    def forward(self, lq: Tensor) -> Tensor:
        return torch.ops.ppsr.colour_mask(lq, *self.settings)


class _Variance(nn.Module):
    def __init__(self, mask: Variance):
        super().__init__()
        self.settings = float(mask.threshold), mask.window_size

    def forward(self, lq: Tensor) -> Tensor:
        return torch.ops.ppsr.variance_mask(lq, *self.settings)


class _Gradient(nn.Module):
    def __init__(self, mask: Gradient):
        super().__init__()
        self.threshold = float(mask.threshold)

    def forward(self, lq: Tensor) -> Tensor:
        return torch.ops.ppsr.gradient_mask(lq, self.threshold)


class _Both(nn.Module):
    def __init__(self, mask: Both):
        super().__init__()
        self.colour, self.variance = _Colour(mask.colour), _Variance(mask.variance)

    def forward(self, lq: Tensor) -> Tensor:
        return self.colour(lq) & self.variance(lq)


def exportable_mask(mask: PixelMask | None) -> nn.Module | None:
    """The mask as the exporter takes it; None stays None.

    Raises:
        UserError: a mask that has no translation.
    """
    if mask is None:
        return None
    kinds = {PurePass: _Colour, Gradient: _Gradient, Variance: _Variance, Both: _Both}
    if type(mask) not in kinds:
        raise UserError(
            f'The mask {mask.name or type(mask).__name__!r} cannot be exported; those that can are colour, '
            'gradient, variance and both.'
        )
    return kinds[type(mask)](mask)


def digits(value, base: int = 256) -> list[np.ndarray]:
    """Integers as (high, middle, low) with value = high·base² + middle·base + low; only high may be negative."""
    value = np.asarray(value, np.int64)
    return [value // base**2, value // base % base, value % base]


def nearest_centre(lq, num_centers: int):
    """(B, 3, H, W) -> (B, 1, H, W) float, a number for each pixel's nearest centre, the same for the same centre.

    The nearest centre has the largest 2·65536·p·c − 65535·‖c‖² (integers, :func:`ppsr.masks.classify_pixels`). With
    65535·‖c‖² = 2¹⁷·u + v that is the largest p·c − u and, among equals, the smallest v and then the first centre: the
    centres are sorted by v beforehand. p·c − u is computed in digits of base 256, each an integer below 2²⁰.
    """
    centers = np.rint(color_centers(num_centers).numpy() * CENTER_STEPS).astype(np.int64)  # (K, 3)
    u, v = np.divmod((centers**2).sum(1) * PIXEL_STEPS, 2 * CENTER_STEPS)
    first = np.argsort(v, kind='stable')
    _, c1, c0 = digits(centers[first])  # below 65536: two digits
    pixels = op.Round(op.Mul(op.Clip(lq, constant(0), constant(1)), constant(PIXEL_STEPS)))
    p1 = op.Floor(op.Mul(pixels, constant(1 / 256)))
    p = op.Concat(p1, op.Sub(pixels, op.Mul(p1, constant(256))), axis=1)  # (B, 6, H, W): high digits, low digits
    none = np.zeros_like(c1)
    weight = np.concatenate([np.concatenate(pair, 1) for pair in ((c1, none), (c0, c1), (none, c0))])  # (3K, 6)
    x = op.Conv(p, constant(weight[:, :, None, None]), constant(-np.concatenate(digits(u[first]))))
    high, middle, low = op.Split(x, num_outputs=3, axis=1)  # (B, K, H, W)
    carry = op.Floor(op.Mul(low, constant(1 / 256)))
    low, middle = op.Sub(low, op.Mul(carry, constant(256))), op.Add(middle, carry)
    carry = op.Floor(op.Mul(middle, constant(1 / 256)))
    middle, high = op.Sub(middle, op.Mul(carry, constant(256))), op.Add(high, carry)
    rest = op.Add(op.Mul(middle, constant(256)), low)
    rest = op.Where(op.Equal(high, op.ReduceMax(high, ints(1), keepdims=1)), rest, constant(-1))
    return as_float(op.ArgMax(rest, axis=1, keepdims=1, select_last_index=0))


def one_label(labels, w: int, offset: int):
    """(B, 1, H, W) -> (B, 1, H, W) bool: whether the window around a pixel holds one label (ppsr.masks.pure_pass)."""
    sides = op.Shape(labels, start=2)  # H, W
    before = op.Where(op.GreaterOrEqual(sides, ints(w, w)), ints(*2 * [(w - offset) % w]), ints(0, 0))
    windows = op.Div(op.Add(op.Add(sides, before), scalar(w - 1)), scalar(w))
    behind = op.Sub(op.Sub(op.Mul(windows, scalar(w)), sides), before)
    pads = shape(0, 0, before, 0, 0, behind)
    x = op.Pad(op.Concat(labels, op.Neg(labels), axis=1), pads, constant(-1e6))  # loses against every label
    x, _ = op.MaxPool(x, kernel_shape=[w, w], strides=[w, w])
    highest, minus_lowest = op.Split(x, num_outputs=2, axis=1)
    pure = op.Unsqueeze(as_float(op.Equal(highest, op.Neg(minus_lowest))), ints(3, 5))  # (B, 1, h, 1, w, 1)
    rows, columns = op.Split(windows, num_outputs=2, axis=0)
    pure = op.Expand(pure, shape(size(labels, 0), 1, rows, w, columns, w))
    pure = op.Reshape(pure, shape(size(labels, 0), 1, op.Mul(windows, scalar(w))))
    pure = op.Slice(pure, before, op.Add(before, sides), ints(2, 3))
    return op.Greater(pure, constant(0.5))


def colour_mask(lq, num_centers: int, window_size: int, shift: int, fuse: bool):
    labels = nearest_centre(as_float(lq), num_centers)
    mask = one_label(labels, window_size, 0)
    if fuse:
        mask = op.Or(mask, one_label(labels, window_size, shift))
    return op.Squeeze(mask, ints(1))


def around(x, w: int):
    """Sum over the w×w neighbourhood of (B, C, H, W); the edge pixel is repeated."""
    for axis in (2, 3):
        pads = [0] * 8
        pads[axis] = pads[axis + 4] = w // 2
        wide, sides = op.Pad(x, ints(*pads), mode='edge'), size(x, axis)
        parts = [op.Slice(wide, ints(i), op.Add(sides, ints(i)), ints(axis)) for i in range(w)]
        x = parts[0]
        for part in parts[1:]:
            x = op.Add(x, part)
    return x


def double(value):
    return constant(value, np.float64)


def as_integers(lq):
    """As ppsr.masks.pure_pass.as_integers, in float64."""
    x = op.Clip(op.Cast(lq, to=TensorProto.DOUBLE), double(0), double(1))
    return op.Round(op.Mul(x, double(PIXEL_STEPS)))


def gradient_mask_of(lq, threshold: float):
    x, total = as_integers(lq), None
    for axis in (2, 3):
        pads = [0] * 8
        pads[axis] = pads[axis + 4] = 1
        wide, sides = op.Pad(x, ints(*pads), mode='edge'), size(x, axis)
        for i in (0, 2):
            difference = op.Sub(op.Slice(wide, ints(i), op.Add(sides, ints(i)), ints(axis)), x)
            square = op.Mul(difference, difference)
            total = square if total is None else op.Add(total, square)
    total = op.ReduceSum(total, ints(1), keepdims=1)
    total = op.Add(op.Mul(total, double(9)), around(total, 3))
    return op.Squeeze(op.Less(total, double(4 * 18 * (PIXEL_STEPS * threshold) ** 2)), ints(1))


def variance_mask_of(lq, threshold: float, window_size: int):
    x, w = as_integers(lq), window_size
    total, squares = around(x, w), around(op.Mul(x, x), w)
    variance = op.Sub(op.Mul(squares, double(w**2)), op.Mul(total, total))
    variance = op.ReduceSum(variance, ints(1), keepdims=0)
    return op.Less(variance, double((w**2 * PIXEL_STEPS * threshold) ** 2))


TRANSLATIONS = {
    torch.ops.ppsr.category_attention.default: category_attention,
    torch.ops.ppsr.window_attention.default: window_attention,
    torch.ops.ppsr.colour_mask.default: colour_mask,
    torch.ops.ppsr.gradient_mask.default: gradient_mask_of,
    torch.ops.ppsr.variance_mask.default: variance_mask_of,
}
