"""Window attention by the compiled CPU kernels (:mod:`ppsr.ops.native`), float32.

Windows are read and written where they are in the map: no partition, no roll. A shifted window at the border is worked
on as the two or four rectangles whose tokens were neighbours before the shift, where the definition adds −100 to the
logits between them: a factor of e⁻¹⁰⁰, unless those logits exceed the others by more than about 80.

Where some tokens are pure, the queries of the others are put side by side, and only they are computed.
"""

import torch

from ppsr.ops.native import call
from ppsr.ops.workspace import empty

__all__ = ['backward', 'forward']


def forward(qkv, bias_table, pure, num_heads, window_size, shift, fill=True, with_lse=True):
    batch, h, w, c3 = qkv.shape
    out, lse = empty(qkv, (batch, h, w, c3 // 3)), empty(qkv, (batch, num_heads, h, w))
    sizes = batch, h, w, c3 // 3, num_heads, window_size, shift, fill
    pure = pure.contiguous() if pure is not None else None
    written = out, lse if with_lse else None
    call('ppsr_window_forward', qkv.contiguous(), bias_table.float().contiguous(), pure, *written, *sizes)
    return out, lse


def backward(grad_out, qkv, out, lse, bias_table, pure, num_heads, window_size, shift):
    batch, h, w, c3 = qkv.shape
    saved = [x.contiguous() for x in (grad_out, qkv, out, lse, bias_table.float())]
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_table = torch.empty_like(bias_table, dtype=torch.float64, memory_format=torch.contiguous_format)
    sizes = batch, h, w, c3 // 3, num_heads, window_size, shift
    pure = pure.contiguous() if pure is not None else None
    call('ppsr_window_backward', *saved, pure, grad_qkv, grad_table, *sizes)
    return grad_qkv, grad_table.to(bias_table.dtype)
