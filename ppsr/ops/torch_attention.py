"""Attention that never holds all of its probabilities: what the ``torch`` backends of both operators share.

Shapes: w independent groups (or windows), h heads, queries (w, h, r, d), keys and values (w, h, s, d), any strides.
The logits are scale·q·kᵀ (+ bias (h, r, s)).

Forward: PyTorch's fused CPU kernel, called by its aten name because only there does it return the log-sum-exp, which
``F.scaled_dot_product_attention`` keeps for itself; elsewhere a few groups at a time with plain products.

Backward: recomputed from the log-sum-exp, a few groups at a time in two buffers that stay in the cache. PyTorch has a
fused backward on the CPU, but it gives no gradient for a bias and is slower than this. Two things make this one fast:
everything is kept with the channels before the tokens, (w, h, d, s), so that the long side of each product is its last
(12 channels as the last dimension take twice the time), and the row-wise differences, logit − lse and dO·vᵀ − (dO·o),
ride along as one channel more of the product.
"""

import torch
from torch import Tensor

__all__ = ['attention', 'attention_backward', 'attention_in_parts', 'buffers', 'wide']

# Elements of a buffer of probabilities: 1 MiB of float32 on the CPU stays in the cache; elsewhere launches cost more.
_CPU_ELEMENTS = 2**18
_DEVICE_ELEMENTS = 2**24


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-sum-exps and of the backward pass: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def buffers(like: Tensor, numel: int) -> Tensor:
    """(2, ≥ numel) scratch for :func:`attention_backward`; `numel` = h·r·s of one group."""
    elements = _CPU_ELEMENTS if like.device.type == 'cpu' else _DEVICE_ELEMENTS
    return torch.empty(2, max(elements, numel), dtype=wide(like.dtype), device=like.device)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: Tensor | float, bias: Tensor | None = None):
    """softmax(scale·q·kᵀ + bias)·v: output (w, h, r, d) in the dtype of q, log-sum-exp (w, h, r) in the wide dtype."""
    if q.device.type == 'cpu':
        if bias is not None:
            bias = bias[None].to(q.dtype).contiguous()  # torch 2.4 reads a mask wrongly whose last stride is not 1
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=float(scale))
    return attention_in_parts(q, k, v, scale, bias)


def attention_in_parts(q: Tensor, k: Tensor, v: Tensor, scale: Tensor | float, bias: Tensor | None = None):
    """:func:`attention` on a device whose fused kernels do not hand out the log-sum-exp or want other head sizes."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=wide(q.dtype), device=q.device)
    step = max(1, _DEVICE_ELEMENTS // (q.shape[1] * q.shape[2] * k.shape[2]))
    for start in range(0, q.shape[0], step):
        part = slice(start, start + step)
        logits = q[part].to(lse.dtype) @ k[part].to(lse.dtype).mT * scale
        if bias is not None:
            logits += bias
        lse[part] = logits.logsumexp(-1)
        out[part] = logits.softmax(-1).to(v.dtype) @ v[part]
    return out, lse


def _channels_first(x: Tensor, last: Tensor | float) -> Tensor:
    """(w, h, s, d) -> contiguous (w·h, d + 1, s): x, and `last` (w, h, s) as one channel more."""
    w, h, s, d = x.shape
    y = torch.empty(w, h, d + 1, s, dtype=wide(x.dtype), device=x.device)
    y[:, :, :d] = x.mT
    y[:, :, d] = last
    return y.flatten(0, 1)


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: Tensor | float,
    buffers: Tensor,
    bias: Tensor | None = None,
    grad_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scale·q, k and v, each (w, h, tokens, d) in the wide dtype; the bias' is added to `grad_bias`.

    Args: as in :func:`attention`; `buffers` from :func:`buffers`; bias and grad_bias, (h, r, s), in the wide dtype.
    """
    w, h, r, d = q.shape
    s = k.shape[2]
    q1 = _channels_first(q, -lse)
    k1 = _channels_first(k, 1.0)
    do1 = _channels_first(grad_out, -(grad_out.to(lse.dtype) * out).sum(-1))
    v1 = _channels_first(v, 1.0)
    q, k, grad_out = q1[:, :d].mul_(scale), k1[:, :d], do1[:, :d]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)

    at_once = max(1, min(w, buffers.shape[1] // (h * r * s))) * h  # w may be 0
    if bias is not None:
        bias = bias.expand(at_once // h, h, r, s).reshape(-1, r, s)
    for i in range(0, w * h, at_once):
        part = slice(i, min(i + at_once, w * h))
        n = part.stop - part.start
        p, ds = (b[: n * r * s].view(n, r, s) for b in buffers)
        if bias is None:
            torch.bmm(q1[part].mT, k1[part], out=p)
        else:
            torch.baddbmm(bias[:n], q1[part].mT, k1[part], out=p)
        p.clamp_(max=0).exp_()  # logits so large that rounding moves them past their log-sum-exp must not overflow
        torch.bmm(grad_out[part], p, out=dv[part])
        torch.bmm(do1[part].mT, v1[part], out=ds)
        ds.mul_(p)  # gradient of the logits
        if grad_bias is not None:
            grad_bias.add_(ds if n == h else ds.unflatten(0, (-1, h)).sum(0))
        torch.bmm(k[part], ds.mT, out=dq[part])
        torch.bmm(q[part], ds, out=dk[part])
    return tuple(x.unflatten(0, (w, h)).mT for x in (dq, dk, dv))
