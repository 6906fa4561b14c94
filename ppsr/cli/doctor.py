"""``ppsr doctor``: what a bug report needs, and whether this installation works."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys

import torch

from ppsr import compat
from ppsr.ops import dispatch, native
from ppsr.version import __version__
from ppsr.weights import list_pretrained

PACKAGES = ('torch', 'torchvision', 'basicsr', 'numpy', 'opencv-python', 'lmdb', 'timm', 'safetensors', 'triton')

# What basicsr 1.4.2 does wrong at run time: done right in our own code instead of being patched. The import breakages
# are found and reported by ppsr.compat.
DONE_OTHERWISE = (
    ('its setup fails on Python ≥ 3.13', lambda: sys.version_info >= (3, 13), 'use Python 3.10–3.12'),
    ('resuming without a GPU calls CUDA', lambda: _no_gpu(), 'ppsr train reads training states on the CPU, safely'),
    ('distributed training assumes CUDA', lambda: _no_gpu(), 'ppsr train joins CPUs with gloo'),
    ('resume keeps neither best metrics nor random state', lambda: True, 'ppsr train keeps both'),
    ('only the Adam optimizer is known', lambda: True, 'PurePassSRModel takes AdamW and others'),
    (
        'lmdb ≥ 2 opens a path only once per process; a read data set cannot be pickled',
        lambda: int((_version('lmdb') or '0').split('.')[0]) >= 2,
        'PairedSRDataset shares environments and opens them anew in workers',
    ),
    ('YAML, --force_yml and weights are loaded unsafely', lambda: True, 'ppsr train/test load all three safely'),
)


def configure(parser) -> None:
    pass


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _no_gpu() -> bool:
    return not torch.cuda.is_available()


def run(args) -> int:
    healthy = True
    print(f'ppsr {__version__}, Python {platform.python_version()}, {platform.platform()}')
    for package in PACKAGES:
        print(f'  {package:14} {_version(package) or "not installed"}')

    print('Device')
    print(
        f'  CPU            {platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads'
    )
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        print(f'  cuda:{i}         {p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}')
    if not torch.cuda.is_available():
        print('  CUDA           no device visible')

    print('Attention backends (PPSR_BACKEND chooses by name)')
    automatic = dispatch.choose(torch.empty(0))
    for name in dispatch.BACKENDS:
        reason = dispatch.available(name)
        chosen = ', taken for float32 on the CPU' if name == automatic else ''
        print(f'  {name:14} ' + (f'not usable: {reason}' if reason else f'ok{chosen}'))
        if name == 'native' and reason is None:
            print(f'  {"":14} instruction set {native.target()}, of {", ".join(native.targets())} on this processor')
            reason = dispatch.no_bf16()
            how = f'computed in fp32: {reason}' if reason else f'{native.bf16_target()}, where it is asked for'
            print(f'  {"":14} bf16: {how}')
    print(f'  C compiler     {shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or "none found"}')

    print('Known breakages of basicsr 1.4.2')
    try:
        import basicsr.archs
        import basicsr.models  # noqa: F401
    except Exception as e:  # whatever it is, it is the finding
        healthy = False
        print(f'  IMPORT FAILS   {type(e).__name__}: {e}')
    for item in compat.report():
        state = 'worked around' if item.worked_around else ('PRESENT' if item.present else 'not here')
        healthy &= item.worked_around or not item.present
        print(f'  {state:14} {item.name}: {item.why}; until {item.until}')
    for name, present, remedy in DONE_OTHERWISE:
        print(f'  {"done otherwise" if present() else "not here":14} {name}; {remedy}')

    print('Shipped weights')
    for name, path in list_pretrained().items():
        print(f'  {name}  {path}')
    print('All well.' if healthy else 'Something above needs mending.')
    return 0 if healthy else 1
