"""Shifted-window attention in PyTorch for any device and dtype.

No roll and no mask. Moving the window grid cyclically and forbidding pairs that meet by wrapping around is the same as
cutting the map itself at the moved grid lines: the tiles along the border are smaller than a window, and inside a tile
everything may attend to everything. The bias depends on offsets alone, so a smaller tile uses the middle of the table.
The masked pairs, e^−100 in the definition, are never computed.

Pure tokens: tiles in which nobody asks are left out; in the others, the rows of those who do not are overwritten.

The bias matrix is built anew in every call, from views: 0.1 ms at 16×16 and 4 heads, too little to keep a cache of
parameters that may change behind its back (an average of weights kept through ``.data`` leaves no trace).
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ppsr.ops import torch_attention
from ppsr.ops.window_attention.reference import relative_position_index

__all__ = ['backward', 'forward']

_TOKENS = 8192  # cut out at a time, at least one row of tiles: 4.7 MB of float32 at 48 channels


def _strips(size: int, window_size: int, shift: int) -> list[tuple[slice, int]]:
    """The extent of a map along one side, cut into strips of equally long tiles: [(extent, length of a tile)]."""
    last = size - (window_size - shift) if shift else size
    strips = [(0, shift, shift), (shift, last, window_size), (last, size, window_size - shift)]
    return [(slice(start, stop), length) for start, stop, length in strips if start < stop]


def _tiles(x: Tensor, rows: tuple[slice, int], columns: tuple[slice, int]) -> Tensor:
    """The tiles of one kind in a map (B, H, W, …): (B, rows, columns, height, width, …), a view."""
    (y, height), (x_, width) = rows, columns
    return x[:, y, x_].unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)


def _kinds(qkv: Tensor, window_size: int, shift: int) -> Iterator[tuple[tuple[slice, int], tuple[slice, int]]]:
    """The kinds of tiles (one without a shift, up to nine with one), as arguments of :func:`_tiles`."""
    for rows in _strips(qkv.shape[1], window_size, shift):
        for columns in _strips(qkv.shape[2], window_size, shift):
            yield rows, columns


def _parts(tiles: Tensor) -> Iterator[tuple[slice, slice]]:
    """Indices (images, rows) that cut tiles (B, rows, columns, height, width, …) into parts of about _TOKENS tokens."""
    batch, rows, *rest = tiles.shape[:5]
    row = rest[0] * rest[1] * rest[2]
    images, some_rows = max(1, _TOKENS // (rows * row)), max(1, _TOKENS // row)
    for b in range(0, batch, images):
        for r in range(0, rows, some_rows):
            yield slice(b, b + images), slice(r, r + some_rows)


def _get(tiles: Tensor, num_heads: int) -> Tensor:
    """(B, rows, columns, height, width, C) -> (number of tiles, h, tokens, d); one copy."""
    return tiles.flatten(0, 2).flatten(1, 2).unflatten(2, (num_heads, -1)).transpose(1, 2)


def _put(tiles: Tensor, x: Tensor) -> None:
    """The inverse of :func:`_get`, into `tiles`."""
    tiles.copy_(x.transpose(1, 2).reshape(tiles.shape))


def _bias(table: Tensor, window_size: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """(h, tokens, tokens) from the table of offsets, (h, y, x, y', x') being table[y − y', x − x']."""
    side = 2 * window_size - 1
    table = table.to(dtype).t().reshape(-1, side, side)
    table = table[:, window_size - height : window_size + height - 1, window_size - width : window_size + width - 1]
    bias = table.unfold(1, height, 1).unfold(2, width, 1).flip(3, 4)  # the window of offsets ends with the first key
    return bias.flatten(3).flatten(1, 2)


@functools.lru_cache(maxsize=16)
def _table_row(window_size: int, height: int, width: int, device: torch.device) -> Tensor:
    """(tokens²,) int64: the row of the table that each element of :func:`_bias` comes from."""
    index = relative_position_index(window_size, device).view([window_size] * 4)
    return index[:height, :width, :height, :width].flatten()


def _asking(tiles: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of a mask of pure tokens, tiles (B, rows, columns, height, width): which tiles have a token that asks, or None if
    all have; and in those, which tokens are pure, (tiles, 1, tokens), or None if none is."""
    pure = tiles.flatten(0, 2).flatten(1)
    some = ~pure.all(1)
    if some.all():
        some = None
    else:
        pure = pure[some]
    return some, pure[:, None] if pure.any() else None


def _select(x: Tensor, some: Tensor | None) -> Tensor:
    return x if some is None else x[some]


def _expand(x: Tensor, some: Tensor | None) -> Tensor:
    """The inverse of :func:`_select`, with zeros for the others."""
    return x if some is None else x.new_zeros(len(some), *x.shape[1:]).index_put_((some,), x)


def forward(qkv, bias_table, pure, num_heads, window_size, shift, *may_leave_out):
    *shape, c3 = qkv.shape
    out = qkv.new_empty(*shape, c3 // 3)
    lse = torch.empty(shape[0], num_heads, *shape[1:], dtype=torch_attention.wide(qkv.dtype), device=qkv.device)
    scale = (c3 // 3 // num_heads) ** -0.5
    for kind in _kinds(qkv, window_size, shift):
        bias = _bias(bias_table, window_size, kind[0][1], kind[1][1], lse.dtype)
        source, target, target_lse = (_tiles(x, *kind) for x in (qkv, out, lse.permute(0, 2, 3, 1)))
        for part in _parts(source):
            some, exempt = (None, None) if pure is None else _asking(_tiles(pure, *kind)[part])
            q, k, v = _select(_get(source[part], 3 * num_heads), some).chunk(3, 1)
            o, part_lse = torch_attention.attention(q, k, v, scale, bias)
            if exempt is not None:
                o, part_lse = o.masked_fill(exempt[..., None], 0), part_lse.masked_fill(exempt, 0)
            _put(target[part], _expand(o, some))
            _put(target_lse[part], _expand(part_lse, some)[..., None])
    return out, lse


def backward(grad_out, qkv, out, lse, bias_table, pure, num_heads, window_size, shift):
    c = out.shape[3]
    grad_qkv = torch.empty_like(qkv)
    grad_table = torch.zeros(bias_table.shape[::-1], dtype=lse.dtype, device=qkv.device)  # (h, offsets)
    scale = (c // num_heads) ** -0.5
    probabilities = torch_attention.buffers(qkv, num_heads * window_size**4)
    for kind in _kinds(qkv, window_size, shift):
        height, width = kind[0][1], kind[1][1]
        bias = _bias(bias_table, window_size, height, width, lse.dtype)
        grad_bias = torch.zeros_like(bias)
        maps = (grad_out, qkv, out, lse.permute(0, 2, 3, 1), grad_qkv)
        grad_source, source, output, source_lse, target = (_tiles(x, *kind) for x in maps)
        for part in _parts(source):
            some, exempt = (None, None) if pure is None else _asking(_tiles(pure, *kind)[part])
            q, k, v = _select(_get(source[part], 3 * num_heads), some).chunk(3, 1)
            do, o, part_lse = (_select(_get(x[part], num_heads), some) for x in (grad_source, output, source_lse))
            part_lse = part_lse[..., 0]
            if exempt is not None:  # a logit of 0 against an endless log-sum-exp: probability 0
                q, do = (x.masked_fill(exempt[..., None], 0) for x in (q, do))
                part_lse = part_lse.masked_fill(exempt, torch.finfo(part_lse.dtype).max)
            dq, dk, dv = torch_attention.attention_backward(
                do, q, k, v, o, part_lse, scale, probabilities, bias, grad_bias
            )
            for x, grad in zip(target[part].split(c, -1), (dq.mul_(scale), dk, dv)):
                _put(x, _expand(grad, some))
        grad_table.index_add_(1, _table_row(window_size, height, width, qkv.device), grad_bias.flatten(1))
    return grad_qkv, grad_table.t().to(bias_table.dtype).contiguous()
