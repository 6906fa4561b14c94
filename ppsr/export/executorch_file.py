"""A network as an ExecuTorch program (.pte) for pictures of one size, on the CPU with XNNPACK.

ExecuTorch knows its own operators alone, with sizes that are known beforehand: our operators are taken apart into
PyTorch's, and all groups of category attention are computed, whatever the mask says. The result is the network's; pure
pixels save no time.
"""

import copy
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppsr.archs.masked import MaskedNetwork
from ppsr.errors import UserError
from ppsr.export.files import first_line, quietly, write
from ppsr.extras import need
from ppsr.ops.window_attention.reference import relative_position_index

__all__ = ['export_executorch', 'fixed_program', 'run_executorch']

FAR = 1 << 40  # behind the key of every token that is not pure
NEVER = -1e9
APART = -100.0


def category_attention(qkv, category, pure, scale, num_heads, category_size, keep, *_):
    """ppsr::category_attention in PyTorch's operators, without a number that depends on the data."""
    batch, n, c3 = qkv.shape
    g = min(n, category_size)
    position = torch.arange(n)
    key = category.long() * n + position
    counts = torch.full((batch, 1), n)
    if pure is not None:
        key = key + pure.long() * FAR
        counts = n - pure.long().sum(1, keepdim=True)
    order = torch.topk(key, n, dim=1, largest=False, sorted=True).indices
    place = torch.arange(-(-n // g) * g)[None]
    there = place < counts
    member = torch.where(there, place, 2 * counts - 1 - place).clamp(0, n - 1)
    token = order.gather(1, member)
    rows = qkv.gather(1, token[..., None].expand(-1, -1, c3))
    rows = rows.view(-1, g, 3, num_heads, c3 // 3 // num_heads).permute(2, 0, 3, 1, 4)  # (3, B·G, h, g, d)
    bias = torch.where(there | (counts >= g), 0.0, NEVER).view(-1, 1, 1, g)
    x = (rows[0] * scale.view(1) @ rows[1].transpose(-2, -1) + bias).softmax(-1) @ rows[2]
    x = x.transpose(1, 2).reshape(batch, -1, c3 // 3)
    rank = torch.zeros_like(order).scatter(1, order, position[None].expand(batch, -1))
    out = x.gather(1, rank[..., None].expand(-1, -1, c3 // 3))
    if pure is not None:
        value = qkv[..., 2 * c3 // 3 :]
        out = torch.where(pure[..., None], value if keep else torch.zeros_like(value), out)
    return out, qkv.new_zeros(batch, num_heads, n), order.int(), counts[:, 0].int()


def roll(x: Tensor, shift: int) -> Tensor:
    for axis in (1, 2):
        start = shift % x.shape[axis]
        x = torch.cat([x.narrow(axis, start, x.shape[axis] - start), x.narrow(axis, 0, start)], axis)
    return x


def behind(size: int, s: int, shift: int) -> Tensor:
    """(size / s, s): 1 for what the roll has brought from the front to the end of a side."""
    return (torch.arange(size) >= size - shift).long().view(-1, s)


def window_attention(qkv, bias_table, pure, num_heads, window_size, shift, *_):
    """ppsr::window_attention in PyTorch's operators."""
    batch, h, w, c3 = qkv.shape
    s, c, d = window_size, c3 // 3, c3 // 3 // num_heads
    x = roll(qkv, shift) if shift else qkv
    x = x.reshape(batch * (h // s), s, w // s, s * c3).transpose(1, 2)
    x = x.reshape(-1, s * s, 3, num_heads, d).permute(2, 0, 3, 1, 4)  # (3, B·n, h, S, d)
    index = relative_position_index(s)
    logits = (x[0] * d**-0.5) @ x[1].transpose(-2, -1) + bias_table[index.flatten()].view(s * s, s * s, -1).permute(
        2, 0, 1
    )
    if shift:
        y, x_ = (behind(size, s, shift) for size in (h, w))
        region = (2 * y[:, None, :, None] + x_[None, :, None, :]).reshape(-1, 1, s * s)  # (n, 1, S)
        apart = torch.where(region[..., :, None] == region[..., None, :], 0.0, APART)  # (n, 1, S, S)
        logits = (logits.view(batch, -1, num_heads, s * s, s * s) + apart).view(logits.shape)
    x = (logits.softmax(-1) @ x[2]).transpose(1, 2).reshape(-1, w // s, s, s * c)
    x = x.transpose(1, 2).reshape(batch, h, w, c)
    x = roll(x, -shift) if shift else x
    if pure is not None:
        x = torch.where(pure[..., None], torch.zeros_like(x), x)
    return x, qkv.new_zeros(batch, num_heads, h, w)


def fixed_program(net: MaskedNetwork, height: int, width: int) -> torch.export.ExportedProgram:
    """The network for one picture (1, 3, height, width), in PyTorch's own operators."""
    net = copy.deepcopy(net).cpu().float().eval()
    table = torch.export.default_decompositions()
    table[torch.ops.ppsr.category_attention.default] = category_attention
    table[torch.ops.ppsr.window_attention.default] = window_attention
    # what is left of cropping where nothing is cropped; ExecuTorch's kernel refuses it behind a channels-last tensor
    table[torch.ops.aten.alias.default] = lambda x: x
    # of the colour centres, and not among the operators that ExecuTorch has
    table[torch.ops.aten.round.decimals] = lambda x, decimals: torch.round(x * 10**decimals) / 10**decimals
    with torch.no_grad():
        return torch.export.export(net, (torch.rand(1, 3, height, width),)).run_decompositions(table)


def export_executorch(net: MaskedNetwork, path: str | Path, height: int, width: int) -> None:
    """Write a network as an ExecuTorch program: (1, 3, height, width) float32 in [0, 1] -> (1, 3, s·height, s·width).

    Raises:
        UserError: ExecuTorch is not installed or does not take the network, or the file cannot be written.
    """
    path = Path(path)
    exir, xnnpack = need(
        'executorch',
        '--format executorch',
        'executorch.exir',
        'executorch.backends.xnnpack.partition.xnnpack_partitioner',
    )

    def lowered() -> bytes:
        try:
            return quietly(_lower, net, height, width, exir, xnnpack.XnnpackPartitioner)
        except Exception as error:  # of torch.export and of each of ExecuTorch's stages
            said = f'ExecuTorch says "{first_line(error)}"'
            raise UserError(f'{type(net).__name__} cannot be exported: {said}.') from error

    write(path, lowered)


def _lower(net: MaskedNetwork, height: int, width: int, exir, partitioner) -> bytes:
    program = fixed_program(net, height, width)
    return exir.to_edge_transform_and_lower(program, partitioner=[partitioner()]).to_executorch().buffer


def run_executorch(path: str | Path) -> tuple[str, Callable[[np.ndarray], list[np.ndarray]]]:
    """Name of the runtime, and a function that runs the program in it."""
    runtime, _ = need('executorch', 'ExecuTorch', 'executorch.runtime', 'executorch')
    program = runtime.Runtime.get().load_program(Path(path))
    method = program.load_method('forward')
    name = f'ExecuTorch {importlib.metadata.version("executorch")}'
    return name, lambda lq: [method.execute((torch.from_numpy(np.ascontiguousarray(lq)),))[0].numpy()]
