"""Which implementation of the operators runs: one choice, made here, for every operator.

Backends, all with the same semantics (the ``reference`` module of each operator is the definition):

============  ======================================================  ===================
name          what it is                                              runs on
============  ======================================================  ===================
``reference``  attention as in the formulas, everything materialised  any device and dtype
``torch``      vectorised PyTorch, fused attention                    any device and dtype
``native``     compiled C kernels, built with the package             CPU, float32
``triton``     Triton kernels                                         CUDA, float32/float16/bfloat16
============  ======================================================  ===================

``native`` also takes over what stands between the attentions where no gradient is wanted (:mod:`ppsr.ops.layers`).

Unless told otherwise the fastest one that can run the given tensors is taken. ``PPSR_BACKEND=name`` (environment) or
``with use_backend(name)`` (code) asks for one by name; where that one cannot run the given tensors, an error says why.
"""

import contextlib
import functools
import importlib
import os
from types import ModuleType

import torch

from ppsr.errors import UserError

__all__ = ['BACKENDS', 'available', 'select', 'use_backend']

BACKENDS = ('native', 'triton', 'torch', 'reference')  # in order of preference
_forced: str | None = None  # set by use_backend; wins over the environment


@functools.cache
def available(name: str) -> str | None:
    """Why backend `name` is not usable in this installation, or None if it is."""
    if name == 'native':
        from ppsr.ops import native

        return native.unavailable_reason()
    if name == 'triton':
        try:
            import triton  # noqa: F401
        except ImportError:
            return 'triton is not installed (pip install triton; it comes with the CUDA builds of torch)'
        if not torch.cuda.is_available() and os.environ.get('TRITON_INTERPRET') != '1':
            return 'no CUDA device is visible'
    return None


def _refusal(name: str, x: torch.Tensor) -> str | None:
    """Why backend `name` cannot take tensor `x`, or None if it can."""
    reason = available(name)
    if reason is not None:
        return reason
    if name == 'native' and (x.device.type != 'cpu' or x.dtype != torch.float32):
        return f'it takes float32 on the CPU, not {str(x.dtype)[6:]} on {x.device.type}'
    if name == 'triton':
        interpreted = os.environ.get('TRITON_INTERPRET') == '1'
        if x.device.type != 'cuda' and not interpreted:
            return f'it takes CUDA tensors, not {x.device.type}'
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f'it takes float32, float16 and bfloat16, not {str(x.dtype)[6:]}'
    return None


def requested() -> str | None:
    """The backend asked for by :func:`use_backend` or ``PPSR_BACKEND``, or None for the automatic choice."""
    name = _forced or os.environ.get('PPSR_BACKEND') or None
    if name is not None and name not in BACKENDS:
        raise UserError(f'PPSR_BACKEND={name!r} is not a backend; choose one of {", ".join(BACKENDS)}, or unset it.')
    return name


def choose(x: torch.Tensor) -> str:
    """Name of the backend that will run on tensor `x`.

    Raises:
        UserError: the backend asked for by name does not exist or cannot take `x`.
    """
    name = requested()
    if name is not None:
        refusal = _refusal(name, x)
        if refusal is not None:
            raise UserError(f'backend {name!r} was asked for but cannot run here: {refusal}.')
        return name
    for name in BACKENDS:
        # the interpreter is for testing a kernel by name, never an automatic choice
        if name == 'triton' and x.device.type != 'cuda':
            continue
        if _refusal(name, x) is None:
            return name
    raise AssertionError('the torch backend takes every tensor')


def select(op: str, x: torch.Tensor) -> ModuleType:
    """Module that implements operator `op` ('category_attention' or 'window_attention') for tensor `x`."""
    return importlib.import_module(f'ppsr.ops.{op}.{choose(x)}')


@contextlib.contextmanager
def use_backend(name: str | None):
    """Run the block with one backend; None restores the automatic choice. Process-wide, for tests and benchmarks."""
    global _forced
    if name is not None and name not in BACKENDS:
        raise UserError(f'{name!r} is not a backend; choose one of {", ".join(BACKENDS)}.')
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous
