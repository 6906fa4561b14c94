"""The definition of shifted-window attention: roll, cut into windows, attend, put back; every matrix materialised.

Slow and large on purpose; it computes in the dtype that it is given. Shapes: (B, H, W) map, windows of s×s = S tokens,
h heads of d channels, n = number of windows of one image.
"""

import torch
from torch import Tensor

__all__ = ['backward', 'forward', 'relative_position_index', 'shift_mask']


def relative_position_index(window_size: int, device=None) -> Tensor:
    """(S, S) int64: the row of the bias table for each pair (query, key) of a window (Swin, eq. 4)."""
    side = torch.arange(window_size, device=device)
    y, x = (grid.flatten() for grid in torch.meshgrid(side, side, indexing='ij'))
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + window_size - 1) * (2 * window_size - 1) + dx + window_size - 1


def shift_mask(h: int, w: int, window_size: int, shift: int, device=None, dtype=torch.float32) -> Tensor:
    """(n, S, S): 0 where a pair of tokens may attend, −100 where only the wrap-around brought them together."""

    def regions(size: int) -> Tensor:
        region = torch.zeros(size, dtype=torch.long, device=device)
        region[size - window_size : size - shift] = 1
        region[size - shift :] = 2
        return region

    region = regions(h)[:, None] * 3 + regions(w)[None, :]
    region = _partition(region[None, :, :, None], window_size)[..., 0]  # (n, S)
    return (region[:, :, None] != region[:, None, :]).to(dtype) * -100.0


def _partition(x: Tensor, s: int) -> Tensor:
    """(B, H, W, C) -> (B·n, S, C)"""
    b, h, w, c = x.shape
    return x.view(b, h // s, s, w // s, s, c).transpose(2, 3).reshape(-1, s * s, c)


def _reverse(windows: Tensor, s: int, h: int, w: int) -> Tensor:
    """(B·n, S, C) -> (B, H, W, C)"""
    c = windows.shape[-1]
    return windows.view(-1, h // s, w // s, s, s, c).transpose(2, 3).reshape(-1, h, w, c)


def _heads(x: Tensor, window_size: int, shift: int, num_heads: int) -> Tensor:
    """(B, H, W, C) -> (B·n, h, S, d)"""
    x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
    return _partition(x.contiguous(), window_size).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _back(x: Tensor, window_size: int, shift: int, h: int, w: int) -> Tensor:
    """(B·n, h, S, d) -> (B, H, W, C): the inverse of :func:`_heads`."""
    x = _reverse(x.transpose(1, 2).flatten(2), window_size, h, w)
    return torch.roll(x, (shift, shift), (1, 2)) if shift else x


def _logits(q: Tensor, k: Tensor, bias_table: Tensor, shape, window_size: int, shift: int) -> Tensor:
    batch, h, w = shape
    index = relative_position_index(window_size, q.device)
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias_table[index].permute(2, 0, 1).to(q.dtype)
    if shift:
        mask = shift_mask(h, w, window_size, shift, q.device, q.dtype)[:, None]  # (n, 1, S, S)
        logits = (logits.unflatten(0, (batch, -1)) + mask).flatten(0, 1)
    return logits


def _asks(pure: Tensor | None, window_size: int, shift: int) -> Tensor | None:
    """(B, H, W) -> (B·n, 1, S, 1) bool: which queries are computed."""
    return None if pure is None else ~_heads(pure[..., None], window_size, shift, 1)


def forward(qkv, bias_table, pure, num_heads, window_size, shift, *may_leave_out):
    h, w = qkv.shape[1:3]
    q, k, v = (_heads(x, window_size, shift, num_heads) for x in qkv.chunk(3, -1))
    logits = _logits(q, k, bias_table, qkv.shape[:3], window_size, shift)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    lse = _back(wide.logsumexp(-1, keepdim=True), window_size, shift, h, w)  # (B, H, W, h)
    out = _back(logits.softmax(-1) @ v, window_size, shift, h, w)
    if pure is not None:
        out, lse = (x.masked_fill(pure[..., None], 0) for x in (out, lse))
    return out, lse.permute(0, 3, 1, 2).contiguous()


def backward(grad_out, qkv, out, lse, bias_table, pure, num_heads, window_size, shift):
    h, w = qkv.shape[1:3]
    q, k, v = (_heads(x, window_size, shift, num_heads) for x in qkv.chunk(3, -1))
    o, do = (_heads(x, window_size, shift, num_heads) for x in (out, grad_out))
    p = _logits(q, k, bias_table, qkv.shape[:3], window_size, shift).softmax(-1)
    asks = _asks(pure, window_size, shift)
    if asks is not None:
        q, p, do = (x.masked_fill(~asks, 0) for x in (q, p, do))
    ds = p * (do @ v.transpose(-2, -1) - (do * o).sum(-1, keepdim=True))  # gradient of the logits
    scale = q.shape[-1] ** -0.5
    grads = ds @ k * scale, ds.transpose(-2, -1) @ q * scale, p.transpose(-2, -1) @ do
    grad_qkv = torch.cat([_back(g, window_size, shift, h, w) for g in grads], -1)
    index = relative_position_index(window_size, q.device).flatten()
    grad_table = torch.zeros_like(bias_table).index_add_(0, index, ds.sum(0).flatten(1).t().to(bias_table.dtype))
    return grad_qkv, grad_table
