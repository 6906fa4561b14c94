"""Shifted-window attention on CUDA, in Triton.

No roll, no partition and no mask in memory: a kernel computes where the tokens of a window lie on the map and which
pairs the cyclic shift alone brought together; those are left out (the definition gives them e^−100). The bias is read
from the small table of offsets, never expanded. One program serves a head and a block of queries (or keys) of a
window.

Pure tokens ask nothing. Where there are any, the places of a window are sorted on the device, those that ask first, and
programs serve blocks of that order: a block in which nobody asks returns at once. The host reads nothing back.

The backward pass recomputes the probabilities from the log-sum-exp: dq by query blocks, dk and dv by key blocks, and
the gradient of the bias by pairs of blocks, a program adding up every SPLITSth window. The matrix of pairs that is left
for each head is folded onto the table by adding along diagonals. No atomics: the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ppsr.ops.triton_tiles import LN_2, LOG2_E, config, dot, load, store

__all__ = ['backward', 'forward']

SPLITS = 8  # programs that share the windows in the gradient of the bias; 64 blocks and heads times this fill a GPU
LARGEST_BLOCK = 32  # the addresses of the bias take registers, too
# Stands in for −∞ where all pairs of a block are left out: the difference of two infinities would be NaN.
LEFT_OUT = tl.constexpr(-1.0e30)


@triton.jit
def _places(window, place, height, width, shift, WINDOW: tl.constexpr):
    """Row and column on the map of places in a window, their region, their offset in the table, and which exist."""
    exists = place < WINDOW * WINDOW
    place = tl.minimum(place, WINDOW * WINDOW - 1)
    y = place // WINDOW
    x = place % WINDOW
    across = width // WINDOW
    row = window // across * WINDOW + y
    column = window % across * WINDOW + x
    region = (row >= height - shift).to(tl.int32) * 2 + (column >= width - shift).to(tl.int32)  # beyond: wrapped around
    row = ((row + shift) % height).to(tl.int64)
    column = ((column + shift) % width).to(tl.int64)
    return row, column, region, y * (2 * WINDOW - 1) + x, exists


@triton.jit
def _bias(table, query, key, seen, head, NUM_HEADS: tl.constexpr, WINDOW: tl.constexpr):
    """The bias of pairs, base 2; query and key are offsets in the table that broadcast against each other."""
    row = query - key + 2 * WINDOW * (WINDOW - 1)
    return tl.load(table + row * NUM_HEADS + head, mask=seen, other=0.0).to(tl.float32) * LOG2_E


@triton.jit
def _program(BLOCK: tl.constexpr, NUM_HEADS: tl.constexpr, WINDOW: tl.constexpr):
    """The image, the head, the window and the places in it that this program serves, heads side by side."""
    blocks: tl.constexpr = (WINDOW * WINDOW + BLOCK - 1) // BLOCK
    block = tl.program_id(0) // NUM_HEADS
    place = block % blocks * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(1).to(tl.int64), tl.program_id(0) % NUM_HEADS, block // blocks, place


@triton.jit
def _asking(order, counts, image, window, place, height, width, MASKED: tl.constexpr, WINDOW: tl.constexpr):
    """The places of the window at positions `place` of its order, and which of them ask; MASKED: some do not."""
    tokens: tl.constexpr = WINDOW * WINDOW
    asked = place < tokens
    if MASKED:
        number = image * (height * width // tokens) + window
        asked = place < tl.load(counts + number)
        place = tl.load(order + number * tokens + place, mask=asked, other=0)
    return place, asked


@triton.jit
def _forward_kernel(
    qkv,
    table,
    out,
    lse,
    order,
    counts,
    height,
    width,
    shift,
    scale,
    stride_b,
    stride_h,
    stride_w,
    stride_c,
    MASKED: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    channels: tl.constexpr = NUM_HEADS * HEAD_DIM
    image, head, window, place = _program(BLOCK_M, NUM_HEADS, WINDOW)
    place, asked = _asking(order, counts, image, window, place, height, width, MASKED, WINDOW)
    if MASKED and tl.max(asked.to(tl.int32)) == 0:
        return
    row, column, region, offset, _ = _places(window, place, height, width, shift, WINDOW)
    qkv += image * stride_b
    out += image * height * width * channels
    lse += (image * NUM_HEADS + head) * height * width
    at_q = head * HEAD_DIM
    at_k = channels + at_q
    at_v = 2 * channels + at_q

    q = load(qkv, row * stride_h + column * stride_w, asked, at_q, HEAD_DIM, BLOCK_D, stride_c)
    peak = tl.full((BLOCK_M,), LEFT_OUT, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, WINDOW * WINDOW, BLOCK_N):
        key_place = start + tl.arange(0, BLOCK_N)
        y, x, key_region, key_offset, counted = _places(window, key_place, height, width, shift, WINDOW)
        k = load(qkv, y * stride_h + x * stride_w, counted, at_k, HEAD_DIM, BLOCK_D, stride_c)
        v = load(qkv, y * stride_h + x * stride_w, counted, at_v, HEAD_DIM, BLOCK_D, stride_c)
        seen = (region[:, None] == key_region[None, :]) & counted[None, :]
        bias = _bias(table, offset[:, None], key_offset[None, :], seen, head, NUM_HEADS, WINDOW)
        logits = tl.where(seen, dot(q, tl.trans(k)) * (scale * LOG2_E) + bias, LEFT_OUT)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        p = tl.exp2(logits - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)  # 0 when the first pair is seen: what was gathered before does not count
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + dot(p.to(v.dtype), v)
        peak = new_peak
    token = row * width + column
    store(out, token * channels, asked, at_q, acc / total[:, None], HEAD_DIM, BLOCK_D, 1)
    tl.store(lse + token, (peak + tl.log2(total)) * LN_2, mask=asked)


@triton.jit
def _query_gradient_kernel(
    grad_out,
    qkv,
    table,
    out,
    lse,
    delta,
    grad_qkv,
    order,
    counts,
    height,
    width,
    shift,
    scale,
    stride_b,
    stride_h,
    stride_w,
    stride_c,
    grad_stride_b,
    grad_stride_h,
    grad_stride_w,
    grad_stride_c,
    MASKED: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq, and delta = rowsum(dO ∘ O) for the other two kernels."""
    channels: tl.constexpr = NUM_HEADS * HEAD_DIM
    image, head, window, place = _program(BLOCK_M, NUM_HEADS, WINDOW)
    place, asked = _asking(order, counts, image, window, place, height, width, MASKED, WINDOW)
    if MASKED and tl.max(asked.to(tl.int32)) == 0:
        return
    row, column, region, offset, _ = _places(window, place, height, width, shift, WINDOW)
    qkv += image * stride_b
    grad_qkv += image * grad_stride_b
    out += image * height * width * channels
    grad_out += image * height * width * channels
    lse += (image * NUM_HEADS + head) * height * width
    delta += (image * NUM_HEADS + head) * height * width
    at_q = head * HEAD_DIM
    at_k = channels + at_q
    at_v = 2 * channels + at_q

    token = row * width + column
    q = load(qkv, row * stride_h + column * stride_w, asked, at_q, HEAD_DIM, BLOCK_D, stride_c)
    o = load(out, token * channels, asked, at_q, HEAD_DIM, BLOCK_D, 1)
    do = load(grad_out, token * channels, asked, at_q, HEAD_DIM, BLOCK_D, 1)
    row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + token, row_delta, mask=asked)
    lse2 = tl.load(lse + token, mask=asked, other=0.0) * LOG2_E
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, WINDOW * WINDOW, BLOCK_N):
        key_place = start + tl.arange(0, BLOCK_N)
        y, x, key_region, key_offset, counted = _places(window, key_place, height, width, shift, WINDOW)
        k = load(qkv, y * stride_h + x * stride_w, counted, at_k, HEAD_DIM, BLOCK_D, stride_c)
        v = load(qkv, y * stride_h + x * stride_w, counted, at_v, HEAD_DIM, BLOCK_D, stride_c)
        seen = (region[:, None] == key_region[None, :]) & asked[:, None] & counted[None, :]
        bias = _bias(table, offset[:, None], key_offset[None, :], seen, head, NUM_HEADS, WINDOW)
        logits = dot(q, tl.trans(k)) * (scale * LOG2_E) + bias
        p = tl.where(seen, tl.exp2(tl.minimum(logits - lse2[:, None], 0.0)), 0.0)
        ds = p * (dot(do, tl.trans(v)) - row_delta[:, None])
        dq += dot(ds.to(k.dtype), k)
    address = row * grad_stride_h + column * grad_stride_w
    store(grad_qkv, address, asked, at_q, dq * scale, HEAD_DIM, BLOCK_D, grad_stride_c)


@triton.jit
def _key_gradient_kernel(
    grad_out,
    qkv,
    table,
    lse,
    delta,
    grad_qkv,
    order,
    counts,
    height,
    width,
    shift,
    scale,
    stride_b,
    stride_h,
    stride_w,
    stride_c,
    grad_stride_b,
    grad_stride_h,
    grad_stride_w,
    grad_stride_c,
    MASKED: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk and dv of a block of keys; logits are transposed here, (keys, queries)."""
    channels: tl.constexpr = NUM_HEADS * HEAD_DIM
    image, head, window, place = _program(BLOCK_N, NUM_HEADS, WINDOW)
    row, column, region, offset, counted = _places(window, place, height, width, shift, WINDOW)
    qkv += image * stride_b
    grad_qkv += image * grad_stride_b
    grad_out += image * height * width * channels
    lse += (image * NUM_HEADS + head) * height * width
    delta += (image * NUM_HEADS + head) * height * width
    at_q = head * HEAD_DIM
    at_k = channels + at_q
    at_v = 2 * channels + at_q

    k = load(qkv, row * stride_h + column * stride_w, counted, at_k, HEAD_DIM, BLOCK_D, stride_c)
    v = load(qkv, row * stride_h + column * stride_w, counted, at_v, HEAD_DIM, BLOCK_D, stride_c)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    asking = WINDOW * WINDOW
    if MASKED:
        asking = tl.load(counts + image * (height * width // (WINDOW * WINDOW)) + window)
    for start in range(0, asking, BLOCK_M):
        query_place = start + tl.arange(0, BLOCK_M)
        query_place, asked = _asking(order, counts, image, window, query_place, height, width, MASKED, WINDOW)
        y, x, query_region, query_offset, _ = _places(window, query_place, height, width, shift, WINDOW)
        token = y * width + x
        q = load(qkv, y * stride_h + x * stride_w, asked, at_q, HEAD_DIM, BLOCK_D, stride_c)
        do = load(grad_out, token * channels, asked, at_q, HEAD_DIM, BLOCK_D, 1)
        lse2 = tl.load(lse + token, mask=asked, other=0.0) * LOG2_E
        row_delta = tl.load(delta + token, mask=asked, other=0.0)
        seen = (region[:, None] == query_region[None, :]) & counted[:, None] & asked[None, :]
        bias = _bias(table, query_offset[None, :], offset[:, None], seen, head, NUM_HEADS, WINDOW)
        logits = dot(k, tl.trans(q)) * (scale * LOG2_E) + bias
        p = tl.where(seen, tl.exp2(tl.minimum(logits - lse2[None, :], 0.0)), 0.0)
        dv += dot(p.to(do.dtype), do)
        ds = p * (dot(v, tl.trans(do)) - row_delta[None, :])
        dk += dot(ds.to(q.dtype), q)
    address = row * grad_stride_h + column * grad_stride_w
    store(grad_qkv, address, counted, at_k, dk * scale, HEAD_DIM, BLOCK_D, grad_stride_c)
    store(grad_qkv, address, counted, at_v, dv, HEAD_DIM, BLOCK_D, grad_stride_c)


@triton.jit
def _bias_gradient_kernel(
    grad_out,
    qkv,
    table,
    lse,
    delta,
    grad_bias,
    pure,
    num_windows,
    height,
    width,
    shift,
    scale,
    stride_b,
    stride_h,
    stride_w,
    stride_c,
    MASKED: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over this program's share of all windows of the gradient of the logits of a pair of blocks."""
    channels: tl.constexpr = NUM_HEADS * HEAD_DIM
    tokens: tl.constexpr = WINDOW * WINDOW
    key_blocks: tl.constexpr = (tokens + BLOCK_N - 1) // BLOCK_N
    head = tl.program_id(0) % NUM_HEADS
    pair = tl.program_id(0) // NUM_HEADS
    split = tl.program_id(1)
    query_place = pair // key_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    key_place = pair % key_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    at_q = head * HEAD_DIM
    at_k = channels + at_q
    at_v = 2 * channels + at_q
    windows = (height // WINDOW) * (width // WINDOW)  # of an image
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(split, num_windows, tl.num_programs(1)):
        image = (i // windows).to(tl.int64)
        row, column, region, offset, asked = _places(i % windows, query_place, height, width, shift, WINDOW)
        y, x, key_region, key_offset, counted = _places(i % windows, key_place, height, width, shift, WINDOW)
        token = (image * height + row) * width + column
        if MASKED:
            asked &= tl.load(pure + token, mask=asked, other=1) == 0
        at = (image * NUM_HEADS + head) * height * width + row * width + column
        start = image * stride_b
        q = load(qkv + start, row * stride_h + column * stride_w, asked, at_q, HEAD_DIM, BLOCK_D, stride_c)
        k = load(qkv + start, y * stride_h + x * stride_w, counted, at_k, HEAD_DIM, BLOCK_D, stride_c)
        v = load(qkv + start, y * stride_h + x * stride_w, counted, at_v, HEAD_DIM, BLOCK_D, stride_c)
        do = load(grad_out, token * channels, asked, at_q, HEAD_DIM, BLOCK_D, 1)
        lse2 = tl.load(lse + at, mask=asked, other=0.0) * LOG2_E
        row_delta = tl.load(delta + at, mask=asked, other=0.0)
        seen = (region[:, None] == key_region[None, :]) & asked[:, None] & counted[None, :]
        bias = _bias(table, offset[:, None], key_offset[None, :], seen, head, NUM_HEADS, WINDOW)
        logits = dot(q, tl.trans(k)) * (scale * LOG2_E) + bias
        p = tl.where(seen, tl.exp2(tl.minimum(logits - lse2[:, None], 0.0)), 0.0)
        acc += p * (dot(do, tl.trans(v)) - row_delta[:, None])
    target = grad_bias + (split * NUM_HEADS + head) * tokens * tokens
    target += query_place[:, None] * tokens + key_place[None, :]
    tl.store(target, acc, mask=(query_place < tokens)[:, None] & (key_place < tokens)[None, :])


def _offsets(x: Tensor) -> Tensor:
    """Sums over pairs of like offset: (…, s, s) -> (…, 2s − 1), entry i − j + s − 1 is the sum of x[…, i, j]."""
    s = x.shape[-1]
    # padded to rows of 2s and read as rows of 2s − 1, row i is shifted right by i places
    rows = F.pad(x.flip(-1), (0, s)).flatten(-2)[..., : s * (2 * s - 1)]
    return rows.unflatten(-1, (s, 2 * s - 1)).sum(-2)


def _order(pure: Tensor | None, window_size: int, shift: int) -> tuple[Tensor | None, Tensor | None]:
    """Places of every window, those that ask first, (B, windows, S), and how many these are, (B, windows); int32."""
    if pure is None:
        return None, None
    pure = torch.roll(pure, (-shift, -shift), (1, 2)) if shift else pure
    pure = pure.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size)).transpose(2, 3).flatten(3).flatten(1, 2)
    order = pure.to(torch.uint8).argsort(dim=2, stable=True).to(torch.int32)
    return order, (~pure).sum(2, dtype=torch.int32)


def _common(qkv: Tensor, pure: Tensor | None, num_heads: int, window_size: int, shift: int):
    """What all launches share: sizes and strides, constants, and the number of blocks of one image."""
    _, h, w, c3 = qkv.shape
    head_dim = c3 // 3 // num_heads
    numbers = (h, w, shift, head_dim**-0.5, *qkv.stride())
    constants = config(qkv.dtype, head_dim, window_size**2, LARGEST_BLOCK)
    constants |= {'NUM_HEADS': num_heads, 'HEAD_DIM': head_dim, 'WINDOW': window_size, 'MASKED': pure is not None}
    blocks = triton.cdiv(window_size**2, constants['BLOCK_M'])  # BLOCK_N is the same
    return numbers, constants, blocks


def forward(qkv, bias_table, pure, num_heads, window_size, shift, *may_leave_out):
    batch, h, w, c3 = qkv.shape
    new = qkv.new_empty if pure is None else qkv.new_zeros  # the rows of pure tokens are not written
    out, lse = new(batch, h, w, c3 // 3), new(batch, num_heads, h, w, dtype=torch.float32)
    numbers, constants, blocks = _common(qkv, pure, num_heads, window_size, shift)
    grid = (h * w // window_size**2 * blocks * num_heads, batch)
    with torch.cuda.device_of(qkv):
        asking = _order(pure, window_size, shift)
        _forward_kernel[grid](qkv, bias_table.contiguous(), out, lse, *asking, *numbers, **constants)
    return out, lse


def backward(grad_out, qkv, out, lse, bias_table, pure, num_heads, window_size, shift):
    batch, h, w, _ = qkv.shape
    grad_out, out, table = grad_out.contiguous(), out.contiguous(), bias_table.contiguous()
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    if pure is not None:  # the queries of pure tokens are not written
        pure = pure.contiguous()
        grad_qkv.zero_()
    numbers, constants, blocks = _common(qkv, pure, num_heads, window_size, shift)
    windows = h * w // window_size**2
    grid = (windows * blocks * num_heads, batch)
    splits = min(SPLITS, windows * batch)
    pairs = qkv.new_empty(splits, num_heads, window_size**2, window_size**2, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        asking = _order(pure, window_size, shift)
        grad = (grad_qkv, *asking, *numbers, *grad_qkv.stride())
        _query_gradient_kernel[grid](grad_out, qkv, table, out, lse, delta, *grad, **constants)
        _key_gradient_kernel[grid](grad_out, qkv, table, lse, delta, *grad, **constants)
        _bias_gradient_kernel[blocks**2 * num_heads, splits](
            grad_out, qkv, table, lse, delta, pairs, pure, windows * batch, *numbers, **constants
        )
    pairs = pairs.sum(0).view(num_heads, *[window_size] * 4).transpose(2, 3)  # (h, y, y', x, x')
    by_column = _offsets(pairs)  # (h, y, y', offset in x)
    by_row = _offsets(by_column.permute(0, 3, 1, 2))  # (h, offset in x, offset in y)
    grad_table = by_row.transpose(1, 2).reshape(num_heads, -1).t()
    return grad_qkv, grad_table.to(bias_table.dtype, memory_format=torch.contiguous_format)
