"""Where and in which precision a network runs: names that users write, checked against what this machine has."""

import contextlib
import threading
from collections.abc import Iterator

import torch

from ppsr.errors import UserError
from ppsr.ops import native

__all__ = [
    'DTYPES',
    'in_precision',
    'no_default_device',
    'resolve_device',
    'resolve_dtype',
    'torch_as_it_comes',
    'torch_defaults',
]

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def resolve_device(device: str | torch.device = 'auto') -> torch.device:
    """'auto' -> the first GPU, else the CPU; UserError for a device that this machine does not have."""
    if str(device) == 'auto':
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f'{device!r} is not a device; use auto, cpu, cuda or cuda:N.') from None
    if device.type not in ('cpu', 'cuda'):
        raise UserError(f'Device {str(device)!r} is not supported; use auto, cpu, cuda or cuda:N.')
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f'Device {str(device)!r} does not exist: {torch.cuda.device_count()} CUDA devices found.')
    return device


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """'fp32', 'bf16', 'fp16' (or the torch dtype) -> torch dtype; UserError where the device does not do it well."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UserError(f'{dtype!r} is not a precision; use {", ".join(DTYPES)}.')
        dtype = DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise UserError(f'{dtype} is not supported; use {", ".join(DTYPES)}.')
    if dtype == torch.float16 and device.type == 'cpu':
        raise UserError('fp16 needs a GPU: CPUs compute it slower and less exactly than fp32; use fp32 or bf16.')
    if dtype == torch.bfloat16 and device.type == 'cuda' and not torch.cuda.is_bf16_supported():
        raise UserError('This GPU has no bf16; use fp32 or fp16.')
    return dtype


def in_precision(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which a network runs forward in a precision, its weights, input and result in float32.

    On a GPU that is autocast. On a CPU bfloat16 are the products of ppsr's own kernels (:func:`ppsr.ops.native.bf16`):
    autocast would run what torch has instead, several times as slow as the kernels in float32.
    """
    if dtype != torch.float32 and device.type != 'cpu':
        return torch.autocast(device.type, dtype)
    contexts = contextlib.ExitStack()
    contexts.enter_context(torch.autocast(device.type, enabled=False))  # a caller's makes no difference
    if dtype != torch.float32:
        contexts.enter_context(native.bf16())
    return contexts


def no_default_device() -> contextlib.AbstractContextManager:
    """Context in which tensors without a device are made on the CPU, whatever the user's program has set."""
    # asked of a tensor: torch.get_default_device() fails in torch 2.4 once a default has been taken back, and sees no
    # `with torch.device(…)` there; on the CPU, as everywhere, entering a context would slow down every call
    if torch.empty(0).device.type == 'cpu':
        return contextlib.nullcontext()
    return torch.device('cpu')


class _Exact:
    """Context in which products of float32 are products of float32 (:func:`torch_as_it_comes`).

    These are settings of the process: they are put back when the last of the threads that are inside leaves.
    """

    def __init__(self):
        self._lock, self._inside, self._undo = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            backends = torch.backends
            wanted = [(backends.mkldnn, 'enabled', (True,))]  # other kernels round differently
            if hasattr(backends.mkldnn, 'conv'):  # torch 2.9
                owners = backends.mkldnn.matmul, backends.mkldnn.conv, backends.cuda.matmul
                wanted += [(owner, 'fp32_precision', ('ieee', 'none')) for owner in owners]
            elif (precision := torch.get_float32_matmul_precision()) != 'highest':
                self._undo.callback(torch.set_float32_matmul_precision, precision)
                torch.set_float32_matmul_precision('highest')
            for owner, name, values in wanted:
                if (found := getattr(owner, name)) not in values:
                    self._undo.callback(setattr, owner, name, found)
                    setattr(owner, name, values[0])

    def __exit__(self, *_) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._undo.close()


_exact = _Exact()


@contextlib.contextmanager
def torch_as_it_comes() -> Iterator[None]:
    """Context in which a network computes what it computes in a process where nothing was set: tensors are made on the
    CPU, and products of float32 are not rounded to bfloat16 or TF32, whatever the user's program has set in torch
    (``set_default_device``, ``set_float32_matmul_precision``, ``backends.….fp32_precision``, ``backends.mkldnn``)."""
    with no_default_device(), _exact:
        yield


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Context in which networks are built in float32 on the CPU, whatever the user's program has set as default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with no_default_device():
            yield
    finally:
        torch.set_default_dtype(before)
