"""Masked category attention in PyTorch for any device and dtype.

A few groups at a time are gathered into a small buffer and go through :mod:`ppsr.ops.torch_attention`, so that neither
a sorted copy of qkv nor the probabilities of a whole image ever exist. The groups that are full are uniform;
the last one, where it is not, has fewer queries than keys: the places that the definition fills up are keys only. The
scale and the number of active tokens are read by the host: on a GPU that synchronises.
"""

import torch
from torch import Tensor

from ppsr.ops import torch_attention
from ppsr.ops.category_attention.reference import group_index, sort_tokens

__all__ = ['backward', 'forward']

_TOKENS = 2048  # gathered at a time: 1.2 MB of float32 at 48 channels, stays in the cache


def _chunks(tokens: Tensor, category_size: int):
    """Cut the sorted active tokens (n,) into parts: (number of groups, queries of each, tokens of all of them)."""
    n = tokens.numel()
    g = min(n, category_size)
    full = n - n % g
    step = max(1, _TOKENS // g) * g
    for start in range(0, full, step):
        part = tokens[start : min(start + step, full)]
        yield part.numel() // g, g, part
    if full < n:
        yield 1, n - full, tokens[group_index(n, g, tokens.device)[-1]]


def _heads(x: Tensor, groups: int, num_heads: int) -> Tensor:
    """(groups·g, C) -> (groups, h, g, d), a view."""
    return x.unflatten(1, (num_heads, -1)).unflatten(0, (groups, -1)).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """(groups, h, g, d) -> (groups·g, C)"""
    return x.transpose(1, 2).flatten(0, 1).flatten(1)


def _gather(x: Tensor, tokens: Tensor, groups: int, num_heads: int, buffer: Tensor) -> list[Tensor]:
    """Queries, keys and values of one image, x (N, 3·C), for the given tokens; they live in `buffer`."""
    rows = torch.index_select(x, 0, tokens, out=buffer[: tokens.numel()])
    return [_heads(part, groups, num_heads) for part in rows.chunk(3, 1)]


def _buffer(qkv: Tensor, category_size: int) -> Tensor:
    return qkv.new_empty(max(_TOKENS, category_size), qkv.shape[2])


def forward(qkv, category, pure, scale, num_heads, category_size, keep, *may_leave_out):
    batch, total, c3 = qkv.shape
    order, counts = sort_tokens(category, pure)
    out = qkv.new_empty(batch, total, c3 // 3)
    lse = torch.empty(batch, num_heads, total, dtype=torch_attention.wide(qkv.dtype), device=qkv.device)
    buffer = _buffer(qkv, min(total, category_size))
    for b, n in enumerate(counts.tolist()):
        tokens, pure_tokens = order[b].long().tensor_split([n])
        if n < total:
            out[b, pure_tokens] = qkv[b, pure_tokens, 2 * c3 // 3 :] if keep else 0
            lse[b, :, pure_tokens] = 0
        if n == 0:
            continue
        for groups, asked, part in _chunks(tokens, category_size):
            q, k, v = _gather(qkv[b], part, groups, num_heads, buffer)
            o, part_lse = torch_attention.attention(q[:, :, :asked], k, v, scale)
            queries = part[: groups * asked]
            out[b].index_copy_(0, queries, _rows(o))
            lse[b].index_copy_(1, queries, part_lse.transpose(0, 1).flatten(1))
    return out, lse, order, counts


def backward(grad_out, qkv, out, lse, order, counts, scale, num_heads, category_size, keep):
    batch, total, c3 = qkv.shape
    grad_qkv = torch.empty_like(qkv)
    grad_scale = torch.zeros((), dtype=lse.dtype, device=qkv.device)
    size = min(total, category_size)
    buffer, probabilities = _buffer(qkv, size), torch_attention.buffers(qkv, num_heads * size**2)
    for b, n in enumerate(counts.tolist()):
        tokens, pure_tokens = order[b].long().tensor_split([n])
        if n < total:
            grad_qkv[b, pure_tokens] = 0
            if keep:
                grad_qkv[b, pure_tokens, 2 * c3 // 3 :] = grad_out[b, pure_tokens]
        if n == 0:
            continue
        for groups, asked, part in _chunks(tokens, category_size):
            q, k, v = _gather(qkv[b], part, groups, num_heads, buffer)
            q = q[:, :, :asked]
            queries, extra = part.tensor_split([groups * asked])
            o, do = (_heads(x[b].index_select(0, queries), groups, num_heads) for x in (out, grad_out))
            part_lse = lse[b].index_select(1, queries).unflatten(1, (groups, -1)).transpose(0, 1)
            dq, dk, dv = torch_attention.attention_backward(do, q, k, v, o, part_lse, scale, probabilities)
            grad_scale += (dq * q).sum()
            dq, dk, dv = _rows(dq.mul_(scale)), _rows(dk), _rows(dv)
            m = queries.numel()
            grad_qkv[b].index_copy_(0, queries, torch.cat([dq, dk[:m], dv[:m]], 1).to(qkv.dtype))
            if len(extra):  # tokens that fill up the last group and have had their own gradient already
                grad_qkv[b, :, c3 // 3 :].index_add_(0, extra, torch.cat([dk[m:], dv[m:]], 1).to(qkv.dtype))
    return grad_qkv, grad_scale.to(scale.dtype).view_as(scale)
