"""Category attention by the compiled CPU kernels (:mod:`ppsr.ops.native`), float32.

Tokens are sorted by counting, groups are read and written through the order: no gathered copy of the map. Queries that
only fill up the last group are not computed.
"""

import ctypes

import torch

from ppsr.ops.native import call
from ppsr.ops.workspace import empty

__all__ = ['backward', 'forward']


def forward(qkv, category, pure, scale, num_heads, category_size, keep, fill=True, with_lse=True):
    batch, n, c3 = qkv.shape
    out, lse = empty(qkv, (batch, n, c3 // 3)), empty(qkv, (batch, num_heads, n))
    order, counts = empty(qkv, (batch, n), torch.int32), empty(qkv, (batch,), torch.int32)
    qkv, category = qkv.contiguous(), category.to(torch.int64).contiguous()
    pure = pure.contiguous() if pure is not None else None
    sizes = batch, n, c3 // 3, num_heads, category_size, keep, fill
    written = out, lse if with_lse else None, order, counts
    call('ppsr_category_forward', qkv, category, pure, float(scale), *written, *sizes)
    return out, lse, order, counts


def backward(grad_out, qkv, out, lse, order, counts, scale, num_heads, category_size, keep):
    batch, n, c3 = qkv.shape
    saved = [x.contiguous() for x in (grad_out, qkv, out, lse, order, counts)]
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_scale = ctypes.c_double()
    sizes = batch, n, c3 // 3, num_heads, category_size, keep
    call('ppsr_category_backward', *saved, float(scale), grad_qkv, ctypes.byref(grad_scale), *sizes)
    return grad_qkv, torch.full_like(scale, grad_scale.value)
