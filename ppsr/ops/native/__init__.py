"""Compiled CPU kernels (float32): the library that setup.py builds from the C files here.

``windows.c`` and ``categories.c`` hold the loops over windows and category groups, ``groups.c`` what these two share,
``layers.c`` the loops over everything else in a layer, ``training.c`` over what has a backward of that, ``runtime.c``
threads and memory. The kernels inside the loops, ``attention_kernels.c``, ``layer_kernels.c`` and
``training_kernels.c``, are compiled once for each instruction set (the best one that the processor has is taken at load
time); ``products.h`` and ``simd.h`` hold what they are made of, ``kernels.h`` and ``training.h`` are the interfaces
between kernels and loops. It is plain C behind ctypes, without headers of torch or Python: one build serves every
version of both, and calls release the GIL. Where there was no C compiler the library is missing, and the ``torch``
backend runs instead.
"""

import contextlib
import ctypes
import functools
import itertools
import sys
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch

__all__ = [
    'bf16',
    'bf16_target',
    'call',
    'library',
    'ready',
    'require',
    'set_target',
    'target',
    'targets',
    'unavailable_reason',
]

LIBRARY = Path(__file__).with_name('libppsr.so')

# Tensors, then sizes, the last of which is the number of threads.
_SIGNATURES = {
    'ppsr_window_forward': 5 * [c_void_p] + 9 * [c_int64],
    'ppsr_window_backward': 8 * [c_void_p] + 8 * [c_int64],
    'ppsr_category_forward': [*3 * [c_void_p], c_float, *4 * [c_void_p], *8 * [c_int64]],
    'ppsr_category_backward': [*6 * [c_void_p], c_float, c_void_p, POINTER(c_double), *7 * [c_int64]],
    'ppsr_linear': [*13 * [c_void_p], c_float, *7 * [c_int64]],
    'ppsr_linear_some': [*13 * [c_void_p], c_float, *6 * [c_int64]],
    'ppsr_linear_stand_in': [*9 * [c_void_p], c_float, *7 * [c_int64]],
    'ppsr_depthwise': 4 * [c_void_p] + 6 * [c_int64],
    'ppsr_linear_backward': [*16 * [c_void_p], c_float, *6 * [c_int64]],
    'ppsr_depthwise_training': 5 * [c_void_p] + 6 * [c_int64],
    'ppsr_depthwise_backward': 7 * [c_void_p] + 6 * [c_int64],
    'ppsr_dictionary_training': 6 * [c_void_p] + 6 * [c_int64],
    'ppsr_dictionary_backward': 9 * [c_void_p] + 6 * [c_int64],
    'ppsr_refinement_training': [*5 * [c_void_p], c_float, *5 * [c_int64]],
    'ppsr_refinement_backward': 9 * [c_void_p] + 5 * [c_int64],
    'ppsr_dictionary_attention': 5 * [c_void_p] + 6 * [c_int64],
    'ppsr_dictionary_refinement': [*6 * [c_void_p], c_float, *6 * [c_int64]],
}


@functools.cache
def openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded, None = not found (GNU's, LLVM's and Intel's all have GOMP_parallel).

    A runtime of our own would make a second team of threads, and the two would spin against each other.
    """
    paths = [None]  # whatever is loaded, where the linker can look there (macOS)
    if sys.platform == 'linux':
        with open('/proc/self/maps') as maps:
            loaded = {line.split(maxsplit=5)[-1].strip() for line in maps if 'omp' in line}
        paths = [path for path in loaded if Path(path).name.startswith(('libgomp', 'libomp', 'libiomp'))]
        paths.sort(key=lambda path: ('torch' not in path, path))  # torch's own, should there be another
    for path in paths:
        try:
            runtime = ctypes.CDLL(path)
        except OSError:
            continue
        if hasattr(runtime, 'GOMP_parallel'):
            return runtime
    return None


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return None, 'the compiled kernels were not built (reinstall ppsr where a C compiler, gcc or clang, is found)'
    try:
        lib = ctypes.CDLL(str(LIBRARY))
        for name, arguments in _SIGNATURES.items():
            getattr(lib, name).argtypes = arguments
            getattr(lib, name).restype = c_int
    except (OSError, AttributeError) as error:
        return None, f'the compiled kernels cannot be loaded ({error}); reinstall ppsr'
    lib.ppsr_target.restype = lib.ppsr_supported_target.restype = lib.ppsr_bf16_target.restype = c_char_p
    lib.ppsr_supported_target.argtypes = [c_int64]
    lib.ppsr_set_target.argtypes = [c_char_p]
    lib.ppsr_exp2.argtypes = [c_void_p, c_void_p, c_int64]
    lib.ppsr_set_team.argtypes = [c_void_p]
    lib.ppsr_set_target(None)
    lib.ppsr_set_team(ctypes.cast(openmp().GOMP_parallel, c_void_p).value if openmp() else None)
    return lib, None


def unavailable_reason() -> str | None:
    """Why the compiled kernels cannot be used, or None if they can."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: there is none, and why.
    """
    lib, reason = _load()
    if lib is None:
        raise RuntimeError(reason)
    return lib


def target() -> str:
    """Instruction set in use: 'avx512', 'avx2' or 'baseline' (SSE2 on x86-64, NEON on arm64)."""
    return library().ppsr_target().decode()


def targets() -> list[str]:
    """The instruction sets that both this processor and the kernels have, best first."""
    names = map(library().ppsr_supported_target, itertools.count())
    return [name.decode() for name in itertools.takewhile(lambda name: name is not None, names)]


def set_target(name: str | None) -> bool:
    """Use another instruction set, process-wide (None: the best one). False, and no change, if there is no such."""
    return library().ppsr_set_target(name.encode() if name else None) == 0


def bf16_target() -> str | None:
    """The kernels that :func:`bf16` takes with the instruction set in use: 'avx512_bf16', or 'emulated_bf16' (slow,
    the same roundings, beside 'baseline'), or None."""
    name = library().ppsr_bf16_target()
    return name and name.decode()


@contextlib.contextmanager
def bf16() -> Iterator[None]:
    """Context in which forward passes of the calling thread round what they multiply to bfloat16, to nearest, ties to
    even: in linear layers (weights, once a LayerNorm's are in them, and inputs, once normalised) and in window and
    category attention (queries times the scale, keys, probabilities before they are divided by their sum, values).

    Products are added up in float32; tensors, LayerNorm, softmax and everything else stay float32. Without
    :func:`bf16_target` nothing is rounded.
    """
    before = library().ppsr_want_bf16(1)
    try:
        yield
    finally:
        library().ppsr_want_bf16(before)


def require(condition: bool, what: str) -> None:
    """ValueError 'the operator takes …' unless the condition holds: C reads what it is given."""
    if not condition:
        raise ValueError(f'the operator takes {what}')


def ready(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors as C reads them: contiguous; ValueError for one that is empty or not float32."""
    require(all(t.dtype == torch.float32 and t.numel() for t in tensors), 'float32 tensors that are not empty')
    return [t.contiguous() for t in tensors]


def call(name: str, *arguments) -> None:
    """Call function `name` of the library with tensors (contiguous, on the CPU), numbers and None (a null pointer).

    The number of threads is appended: that of torch.

    Raises:
        ValueError: a tensor that C cannot read as it is.
        MemoryError: the scratch memory of the threads could not be had.
    """
    for a in arguments:
        if isinstance(a, torch.Tensor) and (a.device.type != 'cpu' or not a.is_contiguous()):
            raise ValueError(f'{name}: tensors must be contiguous and on the CPU, got {tuple(a.shape)} on {a.device}')
    raw = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    if getattr(library(), name)(*raw, torch.get_num_threads()):
        raise MemoryError(f'{name}: not enough memory')
