"""Writes docs/performance.md: all CPU benchmarks on this machine. Takes about half an hour on 2 cores.

python benchmarks/performance.py [-o docs/performance.md] [--runs 5]
"""

import argparse
import sys
from pathlib import Path

import forward
import memory
import train_step
from common import machine

from ppsr.ops import dispatch

INTRODUCTION = """# Performance

Made by `{command}` on this machine: {machine}; default allocator.

What is compared: `reference` is the definition, every attention matrix materialised; `torch` is vectorised PyTorch with
fused attention; `native` are the compiled CPU kernels, in inference for the whole of a layer. All three give the same
network. Absolute seconds are this machine's; the ratios are medians of pairs measured next to each other in one
process. Where other jobs share the processor a single pair can be 10 % off, so differences of one or two per cent mean
little.

The bound is what the multiply-adds take at the speed of a large matrix product and the exponentials at the speed of an
array in the cache: without reading or writing anything.

**No GPU timing has been measured.** The Triton kernels are tested in Triton's interpreter and compiled for sm_80 and
sm_90 (`tests/ops/test_triton.py`); `python benchmarks/gpu.py` is ready for whoever has a GPU.

"""

SETTINGS = """## Settings of the process

The `ppsr` command tells glibc's malloc to keep freed memory (M_MMAP_MAX = 0, a large M_TRIM_THRESHOLD), because fresh
pages are expensive, and flushes denormals to zero, because arithmetic on them is microcoded. `import ppsr` alone does
neither. `PPSR_NO_TUNING=1` switches both off. The figures above were measured without them, except the training step's
memory.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-o', '--output', type=Path, default=Path('docs/performance.md'))
    parser.add_argument('--runs', type=int, default=5)
    args = parser.parse_args()
    backends = [name for name in ('native', 'torch', 'reference') if dispatch.available(name) is None]
    parts = [INTRODUCTION.format(machine=machine(), command=f'python benchmarks/performance.py --runs {args.runs}')]
    for title, make in (
        ('forward', lambda: forward.report(180, 320, args.runs, backends)),
        ('training step', lambda: train_step.report(4, 48, args.runs, backends)),
        ('memory', lambda: memory.report(list(memory.CASES), backends)),
    ):
        print(f'{title} …', file=sys.stderr, flush=True)
        parts.append(make() + '\n')
        args.output.write_text(''.join(parts) + SETTINGS)  # after each part: the later ones take long


if __name__ == '__main__':
    main()
