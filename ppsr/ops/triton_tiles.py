"""What the Triton kernels of both operators share: tiles (tokens, channels of a head) in registers, and their sizes."""

import os

import torch
import triton
import triton.language as tl

__all__ = ['INTERPRETED', 'LN_2', 'LOG2_E', 'config', 'dot', 'load', 'store']

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(os.environ.get('TRITON_INTERPRET') == '1')


@triton.jit
def dot(a, b):
    """a·b in float32; 'ieee' keeps float32 operands from being cut to TF32."""
    if INTERPRETED:  # the interpreter multiplies the bit patterns of bfloat16; the products are exact in float32
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision='ieee')


@triton.jit
def _address(ptr, row, mask, channel, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, stride_c):
    d = tl.arange(0, BLOCK_D)
    return ptr + row[:, None] + (channel + d)[None, :] * stride_c, mask[:, None] & (d < HEAD_DIM)[None, :]


@triton.jit
def load(ptr, row, mask, channel, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, stride_c):
    """The HEAD_DIM channels from `channel` on of the tokens that start at the offsets `row`; zeros where masked."""
    address, mask = _address(ptr, row, mask, channel, HEAD_DIM, BLOCK_D, stride_c)
    return tl.load(address, mask=mask, other=0.0)


@triton.jit
def store(ptr, row, mask, channel, value, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, stride_c):
    """The inverse of :func:`load`, in the dtype of the tensor."""
    address, mask = _address(ptr, row, mask, channel, HEAD_DIM, BLOCK_D, stride_c)
    tl.store(address, value.to(ptr.dtype.element_ty), mask=mask)


def config(dtype: torch.dtype, head_dim: int, group: int, largest: int = 64) -> dict[str, int]:
    """Block sizes and warps for groups (or windows) of `group` tokens, so that a block's state stays in registers.

    Blocks have at most `largest` tokens: a kernel that holds more than the logits of a pair of blocks asks for fewer.

    float32 has no tensor core at full precision: its products keep both operands in registers, which takes more warps.
    Chosen by what the compiler reports, not tuned on a GPU.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    block = max(16, min(largest if block_d <= 32 else 32, triton.next_power_of_2(group)))
    warps = block // 16 * (2 if dtype == torch.float32 else 1)
    return {'BLOCK_M': block, 'BLOCK_N': block, 'BLOCK_D': block_d, 'num_warps': warps, 'num_stages': 1}
