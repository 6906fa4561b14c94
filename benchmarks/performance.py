"""Measures the sections of docs/performance.md: all CPU benchmarks on this machine; half an hour on 2 cores.

python benchmarks/performance.py [-o docs/performance.md] [--runs N] [--only forward frames memory …]
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import forward
import frames
import memory
import peers
import torch
import train_step
from common import machine

from ppsr.generated import write_section
from ppsr.ops import dispatch

# section -> (runs, what makes it of runs and backends); the runs are few where a run is long, many where little differs
SECTIONS = {
    'forward': (3, lambda runs, backends: forward.report('ATDLight', 180, 320, runs, backends)),
    'savings': (5, lambda runs, backends: forward.savings_report(('category',), 180, 320, runs, backends[0])),
    'savings-window': (
        5,
        lambda runs, backends: forward.savings_report(('category', 'window'), 180, 320, runs, backends[0]),
    ),
    'variants': (1, lambda runs, backends: forward.variants_report(180, 320, runs, backends[0])),
    'forward-v2': (3, lambda runs, backends: forward.report('ATDLightV2', 180, 320, runs, backends, brief=True)),
    'frames': (3, lambda runs, _: frames.report('ATDLight', 4, runs)),
    'training-step': (3, lambda runs, backends: train_step.report(4, 48, runs, backends)),
    'memory': (1, lambda runs, backends: memory.report(list(memory.CASES), backends)),
    'peers': (3, lambda runs, _: peers.report(180, 320, runs, 25)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-o', '--output', type=Path, default=Path('docs/performance.md'))
    parser.add_argument('--runs', type=int, help='of each section (default: as many as suit it)')
    parser.add_argument('--only', nargs='+', default=list(SECTIONS), choices=list(SECTIONS))
    args = parser.parse_args()
    backends = [name for name in ('native', 'torch', 'reference') if dispatch.available(name) is None]
    command = shlex.join(['python', 'benchmarks/performance.py', *sys.argv[1:]])
    for name in args.only:
        print(f'{name} …', file=sys.stderr, flush=True)
        runs, make = SECTIONS[name]
        start = time.perf_counter()
        torch.set_grad_enabled(True)
        text = make(args.runs or runs, backends)
        made = f'Made by `{command}` on this machine: {machine()}; default allocator.'
        write_section(args.output, name, f'{made}\n\n{text}')
        print(f'{name}: {(time.perf_counter() - start) / 60:.1f} minutes', file=sys.stderr, flush=True)


if __name__ == '__main__':
    main()
