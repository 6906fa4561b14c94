"""Memory that inference uses again: the maps of one layer lie where those of an earlier one did.

Large blocks come from the kernel page by page when malloc hands them out, and go back when they are freed: at 320×180 a
forward pass spends a tenth of its time on that. Inside of :func:`reuse`, what the CPU kernels write comes from here
instead. A block is taken again when nobody holds it any more, neither a tensor that lies in it nor its storage, and no
other process sees it: nothing that anybody keeps is ever overwritten. All of it may be used by several threads at once.
"""

import contextlib
import math
import os
import sys
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ['MOST', 'empty', 'free', 'held', 'reuse']

MOST = 1 << 30  # bytes that are kept, of all threads together
LEAST = 1 << 16  # bytes of a tensor that is worth it; malloc keeps smaller ones by itself

_use_count = getattr(torch._C, '_storage_Use_Count', None)  # not public: without it nothing is used again
_blocks: list[torch.UntypedStorage] = []  # the one that was taken last is the last
_lock = threading.Lock()
_state = threading.local()


def _begin_anew() -> None:
    global _lock
    _lock = threading.Lock()  # a child must not wait for a thread that it does not have
    _blocks.clear()  # nor keep what such a thread will never let go


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_begin_anew)


@contextlib.contextmanager
def _alone() -> Iterator[bool]:
    """Nobody else changes the blocks meanwhile; False: the calling thread itself was interrupted doing so, by a signal
    handler or a finalizer, and must leave them as they are."""
    if getattr(_state, 'inside', False):
        yield False
        return
    _state.inside = True
    try:
        with _lock:
            yield True
    finally:
        _state.inside = False


@contextlib.contextmanager
def reuse() -> Iterator[None]:
    """Context in which :func:`empty` takes blocks again, for the calling thread."""
    before, _state.on = getattr(_state, 'on', False), True
    try:
        yield
    finally:
        _state.on = before


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of this shape with any contents, on the device and with the dtype of `like` unless told."""
    dtype = dtype or like.dtype
    size = math.prod(shape) * dtype.itemsize
    real = type(like) is Tensor and like.device.type == 'cpu'  # and none that only has a shape
    if not (getattr(_state, 'on', False) and real and size >= LEAST and _use_count):
        return like.new_empty(shape, dtype=dtype)
    with _alone() as alone:
        block = _take(size) if alone else None
        if block is None:
            return like.new_empty(shape, dtype=dtype)
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return torch.empty(0, dtype=dtype).set_(block, 0, shape, strides)  # from now on the block is in use


def _take(size: int) -> torch.UntypedStorage | None:
    """The smallest block that is free and not much too large; or a new one, if there is room for it."""
    free = _unused()
    fits = [block for block in free if size <= block.nbytes() <= 2 * size]
    if fits:
        block = min(fits, key=lambda block: block.nbytes())
        _drop(block)
    else:
        total = sum(block.nbytes() for block in _blocks)
        while free and total + size > MOST:  # who has waited longest goes first
            total -= free[0].nbytes()
            _drop(free.pop(0))
        if total + size > MOST:
            return None
        block = torch.UntypedStorage(size)
    _blocks.append(block)
    return block


def _drop(block: torch.UntypedStorage) -> None:
    del _blocks[next(i for i, other in enumerate(_blocks) if other is block)]


ALONE = [sys.getrefcount(block) for block in [torch.UntypedStorage(0)]][0]  # where a list alone holds it


def _unused() -> list[torch.UntypedStorage]:
    """Blocks that nobody holds; who has waited longest comes first. Those that another process may see leave: a tensor
    that was sent is read there when it is gone here."""
    unused = [block for block in _blocks if _use_count(block._cdata) == 1 and sys.getrefcount(block) == ALONE]
    for block in unused:
        if block.is_shared():
            _drop(block)
    return [block for block in unused if not block.is_shared()]


def free() -> int:
    """Give back what nobody holds; returns how many bytes."""
    with _alone() as alone:
        unused = _unused() if alone else []
        for block in unused:
            _drop(block)
        return sum(block.nbytes() for block in unused)


def held() -> int:
    """Bytes that are kept, used or not."""
    with _alone():  # or in between, which is as good
        return sum(block.nbytes() for block in _blocks)
