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

On a CPU that multiplies bfloat16, ``native`` does so where that is asked for (:func:`ppsr.ops.native.bf16`).
``native`` also takes over what stands between the attentions (:mod:`ppsr.ops.eligibility`), with gradients and without.

Unless told otherwise the fastest one that can run the given tensors is taken. ``PPSR_BACKEND=name`` (environment) or
``with use_backend(name)`` (code) asks for one by name; where that one cannot run the given tensors, an error says why.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from ppsr.errors import UserError
from ppsr.ops import native

__all__ = ['BACKENDS', 'available', 'choose', 'has_data', 'no_bf16', 'select', 'use_backend']


@dataclass(frozen=True)
class Backend:
    """What is to be known of a backend; its modules are found by its name beside each operator."""

    missing: Callable[[], str | None] = lambda: None  # why it is not usable in this installation, or None
    dtypes: tuple[torch.dtype, ...] = ()  # that it takes; empty: any
    devices: Callable[[], tuple[str, ...]] = lambda: ()  # types of device that it takes; empty: any
    automatic: Callable[[torch.device], bool] = lambda device: True  # whether it may be taken without being asked for
    takes: str = ''  # dtypes and devices in words


def _interpreted() -> bool:
    return os.environ.get('TRITON_INTERPRET') == '1'


def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return 'triton is not installed (pip install triton; it comes with the CUDA builds of torch)'
    return None if torch.cuda.is_available() or _interpreted() else 'no CUDA device is visible'


BACKENDS = {  # in order of preference
    'native': Backend(
        missing=native.unavailable_reason,
        dtypes=(torch.float32,),
        devices=lambda: ('cpu',),
        takes='float32 on the CPU',
    ),
    'triton': Backend(
        missing=_triton_missing,
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        devices=lambda: () if _interpreted() else ('cuda',),
        automatic=lambda device: device.type == 'cuda',  # the interpreter is for testing a kernel by name
        takes='float32, float16 and bfloat16 on CUDA devices',
    ),
    'torch': Backend(),
    'reference': Backend(),
}
_forced: str | None = None  # set by use_backend; wins over the environment


@functools.cache
def available(name: str) -> str | None:
    """Why backend `name` is not usable in this installation, or None if it is."""
    return BACKENDS[name].missing()


def _refusal(name: str, x: torch.Tensor) -> str | None:
    """Why backend `name` cannot take tensor `x`, or None if it can."""
    backend, reason = BACKENDS[name], available(name)
    if reason is not None:
        return reason
    devices = backend.devices()
    if (backend.dtypes and x.dtype not in backend.dtypes) or (devices and x.device.type not in devices):
        return f'it takes {backend.takes}, not {str(x.dtype)[6:]} on {x.device.type}'
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
    return next(name for name in BACKENDS if BACKENDS[name].automatic(x.device) and _refusal(name, x) is None)


def no_bf16() -> str | None:
    """Why nothing is gained on this CPU by asking for bfloat16, or None: :func:`ppsr.ops.native.bf16` is faster."""
    if (name := requested()) not in (None, 'native'):
        return f'the backend {name!r} was asked for, and only native has kernels for it'
    if (reason := available('native')) is not None:
        return reason
    if native.bf16_target() != 'avx512_bf16':
        return 'it takes a processor with AVX512-BF16 and kernels that were built for it'
    return None


def select(op: str, x: torch.Tensor) -> ModuleType:
    """Module that implements operator `op` ('category_attention' or 'window_attention') for tensor `x`."""
    return importlib.import_module(f'ppsr.ops.{op}.{choose(x)}')


def has_data(x: torch.Tensor) -> bool:
    """Whether a tensor has values, so that what depends on them can be counted; fake and meta tensors have none."""
    return not (x.is_meta or isinstance(x, torch._subclasses.FakeTensor))


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
