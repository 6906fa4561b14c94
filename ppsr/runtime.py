"""Process-wide settings that the command line makes for itself. ``import ppsr`` alone touches nothing.

- glibc's malloc hands large blocks back to the kernel at once, and every new tensor then pays for fresh pages: those of
  PyTorch itself, since the kernels have workspaces (:mod:`ppsr.ops.workspace`).
- Arithmetic on denormal numbers (tiny probabilities, tiny gradients) is microcoded on many CPUs: flushed to zero.

``PPSR_NO_TUNING=1`` leaves both as they are. Not a matter of speed, and always done: :func:`forbid_unpickling`. For a
while: :func:`threads`.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import torch

__all__ = ['forbid_unpickling', 'threads', 'tune_process']

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>
KEEP_BYTES = 1 << 30  # free memory at the top of the heap that malloc keeps instead of giving it back


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch, and with it the compiled kernels, use so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def forbid_unpickling() -> Iterator[None]:
    """Let torch.load read nothing but weights meanwhile, in this process and its children, whatever calls it.

    A context manager or a decorator.

    basicsr leaves `weights_only` to torch, whose default was False up to 2.5, and is with a variable since.
    """
    names = ('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_WEIGHTS_ONLY_LOAD')
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ[names[1]] = '1'
    try:
        yield
    finally:
        os.environ.pop(names[1], None)
        os.environ.update(before)


def tune_process() -> list[str]:
    """Apply the settings once per process; returns a line for each that is in force."""
    if os.environ.get('PPSR_NO_TUNING', '0') not in ('', '0'):
        return []

    done = []
    if torch.set_flush_denormal(True):
        done.append('denormals are flushed to zero')
    if sys.platform == 'linux':
        mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)  # not in musl
        if mallopt is not None and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, KEEP_BYTES):
            done.append('malloc keeps freed memory')
    return done
