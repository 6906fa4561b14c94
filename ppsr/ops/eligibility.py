"""Who may be fused: when a compiled kernel may stand in for the modules and the PyTorch code that define an operator.

Only where nobody could tell the difference but by the clock: nobody else rewrites the code (torch.compile, autocast),
the tensors are ones that the kernels take, and the modules are PyTorch's own, with nobody waiting to be called when
they run. Where gradients are wanted, only kernels with a backward may (:mod:`ppsr.ops.training_layers`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from ppsr.ops.dispatch import choose

__all__ = ['are_plain', 'are_untouched', 'are_unwatched', 'kernels_take', 'kernels_teach']

# the hooks that are called for every module
WATCHERS = [f'_global_{name}_hooks' for name in ('forward', 'forward_pre', 'backward', 'backward_pre')]


def _free() -> bool:
    """Whether operators may be fused: nobody else rewrites them, nobody watches all modules (as FlopCounterMode,
    profilers and summaries do)."""
    rewritten = torch.compiler.is_compiling() or torch.is_autocast_enabled('cpu')
    return not (rewritten or any(getattr(global_hooks, name) for name in WATCHERS))


def kernels_take(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: float32 on the CPU, with something in them, no subclass of Tensor, and no
    gradient wanted."""
    return not torch.is_grad_enabled() and _fit(tensors)


def kernels_teach(*tensors: Tensor) -> bool:
    """Whether the kernels with a backward take these tensors: the same, and gradients are wanted."""
    return torch.is_grad_enabled() and _fit(tensors)


def _fit(tensors: Sequence[Tensor]) -> bool:
    if not _free() or any(type(t) not in (Tensor, nn.Parameter) or not t.numel() for t in tensors):
        return False
    alike = all(t.dtype == tensors[0].dtype and t.device == tensors[0].device for t in tensors)
    return alike and choose(tensors[0]) == 'native'


def are_untouched(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether the modules are PyTorch's own with weight and bias, nothing around them.

    An adapter in their place, a patched forward or a hook (profilers, offloading) wants to be called.
    """
    return all(type(m) is kind and type(m.weight) is type(m.bias) is nn.Parameter and are_unwatched(m) for m in modules)


def are_unwatched(*modules: nn.Module) -> bool:
    """Whether nothing but the modules' own forward and backward happens when they run."""
    hooks = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
    return not any(any(getattr(m, name) for name in hooks) or 'forward' in vars(m) for m in modules)


def are_plain(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether a kernel may stand in for the modules: they are untouched, and operators may be fused."""
    return _free() and are_untouched(kind, *modules)
