"""Masked category attention on CUDA, in Triton.

Built to spend nothing on pure tokens and to keep the host out of it:

- The tokens are sorted once (torch.sort on the device); the kernels gather queries, keys and values through that order
  and scatter the result, so neither qkv nor its gradient is ever copied into sorted order.
- How many tokens of an image are active stays on the device. The grid is sized for the worst case, nothing pure: one
  program for each head and each block of BLOCK_M sorted positions of a group. Positions behind the last active one are
  the pure tokens, so the programs that attention does not need write the compensation and return. Nothing waits for
  the device and `scale` is read there, too: the whole operator can be captured in a CUDA graph.
- Scaling, softmax (online, so that a group may be larger than a block), the product with v and the compensation are
  one kernel. Logits are kept in base 2 because the hardware's exponential is 2^x.
- The backward pass recomputes the probabilities from the log-sum-exp: one kernel by query blocks (dq, and the partial
  sums of the gradient of scale), one by key blocks (dk, dv). A token that fills up the last group has a second role as
  a key there: the program of its key block simply visits the last group as well. No atomics, hence the same bits in
  every run.

Positions are in sorted order: group G holds the positions G·S … G·S + g − 1, S = category_size, g = min(n, S), n active
tokens; place n + i of the last group is filled with the token at n − 1 − i (see ``reference.group_index``). Head dims
that are no power of two, or below the 16 that tl.dot needs, are padded with zeros in registers. Products and sums are
accumulated in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppsr.ops.triton_tiles import LN_2, LOG2_E, config, dot, load, store

__all__ = ['backward', 'forward']


@triton.jit
def _program(num_blocks, CATEGORY_SIZE: tl.constexpr, BLOCK: tl.constexpr, NUM_HEADS: tl.constexpr):
    """The image, the head, the group and the sorted positions of the group that this program serves.

    Heads come first: the programs that read neighbouring channels of the same tokens run side by side.
    """
    image = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) % NUM_HEADS
    block = tl.program_id(0) // NUM_HEADS
    group = block // num_blocks
    place = (block % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    position = group * CATEGORY_SIZE + place
    return image, head, group, position, place < CATEGORY_SIZE


@triton.jit
def _key_tokens(order, n, group, start, CATEGORY_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tokens at the places start … start + BLOCK_N − 1 of a group, filled up if it is the last, and which exist."""
    place = start + tl.arange(0, BLOCK_N)
    exists = place < tl.minimum(n, CATEGORY_SIZE)
    position = group * CATEGORY_SIZE + place
    position = tl.where(position < n, position, 2 * n - 1 - position)
    return tl.load(order + position, mask=exists, other=0).to(tl.int64), exists


@triton.jit
def _forward_kernel(
    qkv,
    order,
    counts,
    scale,
    out,
    lse,
    num_tokens,
    num_blocks,
    stride_b,
    stride_n,
    stride_c,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CATEGORY_SIZE: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    channels: tl.constexpr = NUM_HEADS * HEAD_DIM
    image, head, group, position, exists = _program(num_blocks, CATEGORY_SIZE, BLOCK_M, NUM_HEADS)
    exists &= position < num_tokens
    n = tl.load(counts + image)
    active = exists & (position < n)
    pure = exists & (position >= n)

    qkv += image * stride_b
    order += image * num_tokens
    out += image * num_tokens * channels
    lse += (image * NUM_HEADS + head) * num_tokens
    at_q = head * HEAD_DIM
    at_k = channels + at_q
    at_v = 2 * channels + at_q
    token = tl.load(order + position, mask=exists, other=0).to(tl.int64)

    if tl.max(position) >= n:  # pure tokens, if any: their compensation
        if KEEP:
            value = load(qkv, token * stride_n, pure, at_v, HEAD_DIM, BLOCK_D, stride_c)
        else:
            value = tl.zeros((BLOCK_M, BLOCK_D), qkv.dtype.element_ty)
        store(out, token * channels, pure, at_q, value, HEAD_DIM, BLOCK_D, 1)
        tl.store(lse + token, tl.zeros((BLOCK_M,), tl.float32), mask=pure)
    if tl.min(position) >= n:
        return

    q = load(qkv, token * stride_n, active, at_q, HEAD_DIM, BLOCK_D, stride_c)
    scale2 = tl.load(scale).to(tl.float32) * LOG2_E
    peak = tl.full((BLOCK_M,), float('-inf'), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, tl.minimum(n, CATEGORY_SIZE), BLOCK_N):
        key, counted = _key_tokens(order, n, group, start, CATEGORY_SIZE, BLOCK_N)
        k = load(qkv, key * stride_n, counted, at_k, HEAD_DIM, BLOCK_D, stride_c)
        v = load(qkv, key * stride_n, counted, at_v, HEAD_DIM, BLOCK_D, stride_c)
        logits = dot(q, tl.trans(k)) * scale2
        logits = tl.where(counted[None, :], logits, float('-inf'))
        new_peak = tl.maximum(peak, tl.max(logits, 1))  # finite from the first block on: it holds a key that exists
        p = tl.exp2(logits - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + dot(p.to(v.dtype), v)
        peak = new_peak
    store(out, token * channels, active, at_q, acc / total[:, None], HEAD_DIM, BLOCK_D, 1)
    tl.store(lse + token, (peak + tl.log2(total)) * LN_2, mask=active)


@triton.jit
def _query_gradient_kernel(
    grad_out,
    qkv,
    out,
    lse,
    order,
    counts,
    scale,
    grad_qkv,
    grad_scale,
    delta,
    num_tokens,
    num_blocks,
    stride_b,
    stride_n,
    stride_c,
    grad_stride_b,
    grad_stride_n,
    grad_stride_c,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CATEGORY_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq, delta = rowsum(dO ∘ O) for the other kernel, and this program's part of the gradient of scale."""
    channels: tl.constexpr = NUM_HEADS * HEAD_DIM
    image, head, group, position, exists = _program(num_blocks, CATEGORY_SIZE, BLOCK_M, NUM_HEADS)
    exists &= position < num_tokens
    n = tl.load(counts + image)
    active = exists & (position < n)

    qkv += image * stride_b
    grad_qkv += image * grad_stride_b
    order += image * num_tokens
    out += image * num_tokens * channels
    grad_out += image * num_tokens * channels
    lse += (image * NUM_HEADS + head) * num_tokens
    delta += (image * NUM_HEADS + head) * num_tokens
    grad_scale += image * tl.num_programs(0) + tl.program_id(0)
    at_q = head * HEAD_DIM
    at_k = channels + at_q
    at_v = 2 * channels + at_q
    token = tl.load(order + position, mask=exists, other=0).to(tl.int64)

    if tl.min(position) >= n:
        zero = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        store(grad_qkv, token * grad_stride_n, exists, at_q, zero, HEAD_DIM, BLOCK_D, grad_stride_c)
        tl.store(grad_scale, 0.0)
        return

    # rows that are not active are zeros and stay zeros throughout: a pure token's dq is right as it comes
    q = load(qkv, token * stride_n, active, at_q, HEAD_DIM, BLOCK_D, stride_c)
    o = load(out, token * channels, active, at_q, HEAD_DIM, BLOCK_D, 1)
    do = load(grad_out, token * channels, active, at_q, HEAD_DIM, BLOCK_D, 1)
    row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + token, row_delta, mask=active)
    lse2 = tl.load(lse + token, mask=active, other=0.0) * LOG2_E
    s = tl.load(scale).to(tl.float32)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dscale = tl.zeros((BLOCK_M,), tl.float32)
    excess = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, tl.minimum(n, CATEGORY_SIZE), BLOCK_N):
        key, counted = _key_tokens(order, n, group, start, CATEGORY_SIZE, BLOCK_N)
        k = load(qkv, key * stride_n, counted, at_k, HEAD_DIM, BLOCK_D, stride_c)
        v = load(qkv, key * stride_n, counted, at_v, HEAD_DIM, BLOCK_D, stride_c)
        product = dot(q, tl.trans(k))
        # never above 0: logits so large that rounding moves them past their log-sum-exp must not overflow
        logits = tl.minimum(product * (s * LOG2_E) - lse2[:, None], 0.0)
        p = tl.where(counted[None, :] & active[:, None], tl.exp2(logits), 0.0)
        dp = dot(do, tl.trans(v))
        mean += tl.sum(p * product, 1)
        ds = p * (dp - row_delta[:, None])  # gradient of the logits
        excess += tl.sum(ds, 1)
        dscale += tl.sum(ds * product, 1)
        dq += dot(ds.to(k.dtype), k)
    store(grad_qkv, token * grad_stride_n, exists, at_q, dq * s, HEAD_DIM, BLOCK_D, grad_stride_c)
    # a row of ds adds up to 0, but for the rounding of `out` in delta, which would spoil this sum in 16 bits
    tl.store(grad_scale, tl.sum(dscale - excess * mean))


@triton.jit
def _key_gradient_kernel(
    grad_out,
    qkv,
    lse,
    order,
    counts,
    scale,
    grad_qkv,
    delta,
    num_tokens,
    num_blocks,
    stride_b,
    stride_n,
    stride_c,
    grad_stride_b,
    grad_stride_n,
    grad_stride_c,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CATEGORY_SIZE: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk and dv of a block of keys, pure tokens included; logits are transposed here, (keys, queries)."""
    channels: tl.constexpr = NUM_HEADS * HEAD_DIM
    image, head, group, position, exists = _program(num_blocks, CATEGORY_SIZE, BLOCK_N, NUM_HEADS)
    exists &= position < num_tokens
    n = tl.load(counts + image)
    active = exists & (position < n)
    pure = exists & (position >= n)

    qkv += image * stride_b
    grad_qkv += image * grad_stride_b
    order += image * num_tokens
    grad_out += image * num_tokens * channels
    lse += (image * NUM_HEADS + head) * num_tokens
    delta += (image * NUM_HEADS + head) * num_tokens
    at_q = head * HEAD_DIM
    at_k = channels + at_q
    at_v = 2 * channels + at_q
    token = tl.load(order + position, mask=exists, other=0).to(tl.int64)

    if tl.max(position) >= n:  # pure tokens, if any
        dv = tl.zeros((BLOCK_N, BLOCK_D), grad_out.dtype.element_ty)
        store(grad_qkv, token * grad_stride_n, pure, at_k, dv, HEAD_DIM, BLOCK_D, grad_stride_c)
        if KEEP:
            dv = load(grad_out, token * channels, pure, at_q, HEAD_DIM, BLOCK_D, 1)
        store(grad_qkv, token * grad_stride_n, pure, at_v, dv, HEAD_DIM, BLOCK_D, grad_stride_c)
    if tl.min(position) >= n:
        return

    # the positions that fill up the last group are the last ones, as many as places are missing
    last = (n - 1) // CATEGORY_SIZE
    fills = position >= 2 * n - tl.maximum(n, (last + 1) * CATEGORY_SIZE)
    fills = fills & active & (n > CATEGORY_SIZE)
    roles = 1 + tl.max(fills.to(tl.int32))

    k = load(qkv, token * stride_n, active, at_k, HEAD_DIM, BLOCK_D, stride_c)
    v = load(qkv, token * stride_n, active, at_v, HEAD_DIM, BLOCK_D, stride_c)
    s = tl.load(scale).to(tl.float32)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for role in range(roles):  # as a member of its group, then as filling of the last one
        asking = tl.where(role == 0, group, last)
        counted = active & (fills | (role == 0))
        first = asking * CATEGORY_SIZE
        stop = tl.minimum(n, first + CATEGORY_SIZE)
        for start in range(first, stop, BLOCK_M):
            query_position = start + tl.arange(0, BLOCK_M)
            asked = query_position < stop
            query = tl.load(order + query_position, mask=asked, other=0).to(tl.int64)
            q = load(qkv, query * stride_n, asked, at_q, HEAD_DIM, BLOCK_D, stride_c)
            do = load(grad_out, query * channels, asked, at_q, HEAD_DIM, BLOCK_D, 1)
            lse2 = tl.load(lse + query, mask=asked, other=0.0) * LOG2_E
            row_delta = tl.load(delta + query, mask=asked, other=0.0)
            logits = dot(k, tl.trans(q)) * (s * LOG2_E)
            p = tl.where(counted[:, None] & asked[None, :], tl.exp2(tl.minimum(logits - lse2[None, :], 0.0)), 0.0)
            dv += dot(p.to(do.dtype), do)
            dp = dot(v, tl.trans(do))
            ds = p * (dp - row_delta[None, :])
            dk += dot(ds.to(q.dtype), q)
    store(grad_qkv, token * grad_stride_n, active, at_k, dk * s, HEAD_DIM, BLOCK_D, grad_stride_c)
    store(grad_qkv, token * grad_stride_n, active, at_v, dv, HEAD_DIM, BLOCK_D, grad_stride_c)


def _grid(qkv: Tensor, num_heads: int, category_size: int, block: int) -> tuple[tuple[int, int], int]:
    """The grid for the case that nothing is pure, and how many blocks of it make a group."""
    batch, n = qkv.shape[:2]
    num_blocks = triton.cdiv(min(n, category_size), block)
    return (triton.cdiv(n, category_size) * num_blocks * num_heads, batch), num_blocks


def _sort(category: Tensor, pure: Tensor | None) -> tuple[Tensor, Tensor]:
    """``reference.sort_tokens`` in one sort for all images, of 32-bit keys: half the passes of a radix sort."""
    key = category.to(torch.int32)  # no image has 2³¹ categories
    if pure is None:
        counts = torch.full(category.shape[:1], category.shape[1], dtype=torch.int32, device=category.device)
    else:
        key = key.masked_fill(pure, torch.iinfo(torch.int32).max)
        counts = (~pure).sum(1, dtype=torch.int32)
    return key.argsort(dim=1, stable=True).to(torch.int32), counts


def forward(qkv, category, pure, scale, num_heads, category_size, keep, *may_leave_out):
    order, counts = _sort(category, pure)
    batch, n, c3 = qkv.shape
    out = qkv.new_empty(batch, n, c3 // 3)
    lse = qkv.new_empty(batch, num_heads, n, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse, order, counts
    head_dim = c3 // 3 // num_heads
    cfg = config(qkv.dtype, head_dim, category_size)
    grid, num_blocks = _grid(qkv, num_heads, category_size, cfg['BLOCK_M'])
    with torch.cuda.device_of(qkv):
        _forward_kernel[grid](
            *(qkv, order, counts, scale, out, lse, n, num_blocks, *qkv.stride()),
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            CATEGORY_SIZE=category_size,
            KEEP=keep,
            **cfg,
        )
    return out, lse, order, counts


def backward(grad_out, qkv, out, lse, order, counts, scale, num_heads, category_size, keep):
    n = qkv.shape[1]
    grad_qkv = torch.empty_like(qkv)
    if qkv.numel() == 0:
        return grad_qkv, torch.zeros_like(scale)
    grad_out, out = grad_out.contiguous(), out.contiguous()
    head_dim = qkv.shape[2] // 3 // num_heads
    cfg = config(qkv.dtype, head_dim, category_size)
    shape = {'NUM_HEADS': num_heads, 'HEAD_DIM': head_dim, 'CATEGORY_SIZE': category_size}
    delta = torch.empty_like(lse)
    grid, num_blocks = _grid(qkv, num_heads, category_size, cfg['BLOCK_M'])
    grad_scale = qkv.new_empty(grid[1], grid[0], dtype=torch.float32)  # one partial sum for each program
    with torch.cuda.device_of(qkv):
        _query_gradient_kernel[grid](
            *(grad_out, qkv, out, lse, order, counts, scale, grad_qkv, grad_scale, delta, n, num_blocks),
            *(*qkv.stride(), *grad_qkv.stride()),
            **shape,
            **cfg,
        )
        grid, num_blocks = _grid(qkv, num_heads, category_size, cfg['BLOCK_N'])
        _key_gradient_kernel[grid](
            *(grad_out, qkv, lse, order, counts, scale, grad_qkv, delta, n, num_blocks),
            *(*qkv.stride(), *grad_qkv.stride()),
            KEEP=keep,
            **shape,
            **cfg,
        )
    return grad_qkv, grad_scale.sum().to(scale.dtype).view_as(scale)
