"""Process-wide settings that the command line makes for itself. ``import ppsr`` alone touches nothing.

- glibc's malloc hands large blocks back to the kernel at once, and every new tensor then pays for fresh pages; keeping
  them makes CPU inference about twice as fast (docs/performance.md).
- Arithmetic on denormal numbers (tiny probabilities, tiny gradients) is microcoded on many CPUs: flushed to zero.

``PPSR_NO_TUNING=1`` leaves both as they are.
"""

import ctypes
import os
import sys

__all__ = ['tune_process']

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>
KEEP_BYTES = 1 << 30  # free memory at the top of the heap that malloc keeps instead of giving it back


def tune_process() -> list[str]:
    """Apply the settings once per process; returns a line for each that is in force."""
    if os.environ.get('PPSR_NO_TUNING', '0') not in ('', '0'):
        return []
    import torch

    done = []
    if torch.set_flush_denormal(True):
        done.append('denormals are flushed to zero')
    if sys.platform == 'linux':
        mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)  # not in musl
        if mallopt is not None and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, KEEP_BYTES):
            done.append('malloc keeps freed memory')
    return done
