"""Measures the sections of docs/performance.md: all CPU benchmarks on this machine; half an hour on 2 cores.

python benchmarks/performance.py [-o docs/performance.md] [--runs 5] [--only forward frames memory …]
"""

import argparse
import shlex
import sys
from pathlib import Path

import forward
import frames
import memory
import peers
import train_step
from common import machine

from ppsr.generated import write_section
from ppsr.ops import dispatch

SECTIONS = {
    'forward': lambda runs, backends: forward.report('ATDLight', 180, 320, runs, backends),
    'forward-v2': lambda runs, backends: forward.report('ATDLightV2', 180, 320, runs, backends, brief=True),
    'frames': lambda runs, _: frames.report('ATDLight', 4, runs),
    'training-step': lambda runs, backends: train_step.report(4, 48, runs, backends),
    'memory': lambda runs, backends: memory.report(list(memory.CASES), backends),
    'peers': lambda runs, _: peers.report(180, 320, runs, 25),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-o', '--output', type=Path, default=Path('docs/performance.md'))
    parser.add_argument('--runs', type=int, default=5)
    parser.add_argument('--only', nargs='+', default=list(SECTIONS), choices=list(SECTIONS))
    args = parser.parse_args()
    backends = [name for name in ('native', 'torch', 'reference') if dispatch.available(name) is None]
    command = shlex.join(['python', 'benchmarks/performance.py', *sys.argv[1:]])
    for name in args.only:
        print(f'{name} …', file=sys.stderr, flush=True)
        made = f'Made by `{command}` on this machine: {machine()}; default allocator.'
        write_section(args.output, name, f'{made}\n\n{SECTIONS[name](args.runs, backends)}')


if __name__ == '__main__':
    main()
