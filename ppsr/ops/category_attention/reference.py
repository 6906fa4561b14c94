"""The definition of masked category attention: one image at a time, every matrix materialised.

Slow and large on purpose. It computes in the dtype that it is given; the other backends are tested against it in
float64. Shapes: B images, N tokens, C channels, h heads of d = C/h, groups of g tokens.
"""

import torch
from torch import Tensor

__all__ = ['backward', 'forward', 'group_index', 'sort_tokens']


def sort_tokens(category: Tensor, pure: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token order in which groups are cut: by category, stable, the pure tokens behind all others.

    Returns:
        order (B, N) int32: order[b, p] is the token at sorted position p; counts (B,) int32: how many are active.
    """
    if pure is None:
        counts = torch.full((category.shape[0],), category.shape[1], dtype=torch.int32, device=category.device)
    else:
        category = category.long()  # the largest category + 1 may not fit into uint8
        category = category.masked_fill(pure, category.amax() + 1)
        counts = (~pure).sum(1, dtype=torch.int32)
    # row by row: PyTorch sorts integers by radix in one dimension only, here in a quarter of the time
    return torch.stack([row.argsort(stable=True) for row in category]).to(torch.int32), counts


def group_index(n: int, category_size: int, device=None) -> Tensor:
    """Sorted position of every member of every group: (⌈n/g⌉, g), g = min(n, category_size).

    The places past position n − 1 are filled with the last tokens in reverse order: n holds n − 1, n + 1 holds n − 2, …
    """
    g = min(n, category_size)
    position = torch.arange(-(-n // g) * g, device=device)
    return torch.where(position < n, position, 2 * n - 1 - position).view(-1, g)


def _heads(x: Tensor, index: Tensor, num_heads: int) -> Tensor:
    """(n, C) of the active tokens in sorted order -> (G, h, g, d), the members of every group."""
    return x[index].unflatten(-1, (num_heads, -1)).transpose(1, 2)


def forward(qkv, category, pure, scale, num_heads, category_size, keep, *may_leave_out):
    order, counts = sort_tokens(category, pure)
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    lse = qkv.new_zeros(qkv.shape[0], num_heads, qkv.shape[1], dtype=wide)
    v = qkv[..., 2 * qkv.shape[2] // 3 :]
    out = v.clone() if keep else torch.zeros_like(v)  # what the pure tokens get; the others are overwritten
    for b, n in enumerate(counts.tolist()):
        if n == 0:
            continue
        tokens, index = order[b, :n].long(), group_index(n, category_size, qkv.device)
        q, k, v = (_heads(x, index, num_heads) for x in qkv[b, tokens].chunk(3, -1))
        logits = q @ k.transpose(-2, -1) * scale.to(q.dtype)  # (G, h, g, g)
        # the filled-up places are queries, too, but nobody asks for their answer: [:n]
        out[b, tokens] = (logits.softmax(-1) @ v).transpose(1, 2).reshape(-1, out.shape[2])[:n]
        lse[b][:, tokens] = logits.to(wide).logsumexp(-1).transpose(0, 1).reshape(num_heads, -1)[:, :n]
    return out, lse, order, counts


def backward(grad_out, qkv, out, lse, order, counts, scale, num_heads, category_size, keep):
    grad_qkv = torch.zeros_like(qkv)
    grad_scale = torch.zeros((), dtype=lse.dtype, device=qkv.device)
    if keep:  # right for the pure tokens; the others are overwritten
        grad_qkv[..., 2 * qkv.shape[2] // 3 :] = grad_out
    for b, n in enumerate(counts.tolist()):
        if n == 0:
            continue
        tokens, index = order[b, :n].long(), group_index(n, category_size, qkv.device)
        asked = (torch.arange(index.numel(), device=qkv.device) < n).view(-1, 1, index.shape[1], 1)
        q, k, v = (_heads(x, index, num_heads) for x in qkv[b, tokens].chunk(3, -1))
        o, do = (_heads(x[b, tokens], index, num_heads) * asked for x in (out, grad_out))
        s = scale.to(q.dtype)
        product = q @ k.transpose(-2, -1)
        p = (product * s).softmax(-1)
        ds = p * (do @ v.transpose(-2, -1) - (do * o).sum(-1, keepdim=True))  # gradient of the logits
        grad_scale += (ds * product).sum(dtype=lse.dtype)
        grads = ds @ k * s, ds.transpose(-2, -1) @ q * s, p.transpose(-2, -1) @ do
        grad = torch.cat([g.transpose(1, 2).reshape(index.numel(), -1) for g in grads], -1)
        grad_tokens = qkv.new_zeros(n, qkv.shape[2])
        grad_tokens.index_add_(0, index.flatten(), grad)  # a token that fills up the last group collects twice
        grad_qkv[b, tokens] = grad_tokens
    return grad_qkv, grad_scale.to(scale.dtype).view_as(scale)
