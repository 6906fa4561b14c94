"""Pure-Pass for BasicSR.

``import ppsr`` makes basicsr 1.4.2 importable on today's stack (:mod:`ppsr.compat`) and registers this package's archs,
models and data sets in basicsr's registries, so that an options file may name them. It changes nothing else.
"""

import importlib

from ppsr import compat

compat.apply()  # before anything of basicsr

import ppsr.archs  # noqa: E402
import ppsr.data  # noqa: E402
import ppsr.models  # noqa: E402, F401
from ppsr.masks.pure_pass import PurePass  # noqa: E402
from ppsr.ops.workspace import free as free_workspace  # noqa: E402
from ppsr.version import __version__  # noqa: E402

__all__ = ['PurePass', 'Upscaler', '__version__', 'free_workspace', 'load_model']

_LAZY = {'Upscaler': 'ppsr.pictures.upscaler', 'load_model': 'ppsr.weights'}  # not needed to register archs


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
