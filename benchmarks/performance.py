"""Measures the sections of docs/performance.md, each by itself: all CPU benchmarks on this machine.

    python benchmarks/performance.py [-o docs/performance.md] [--runs N] [--only forward frames memory …] [--quick]

Every section says how it was made and how long that took; the section `time` adds that up.
"""

import argparse
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import forward
import frames
import memory
import peers
import torch
import train_step
from common import machine, table

from ppsr.errors import UserError
from ppsr.generated import write_section
from ppsr.ops import dispatch


@dataclass(frozen=True)
class Setting:
    """What a section is measured with."""

    runs: int
    backends: list[str]
    size: tuple[int, int] = (180, 320)  # height, width
    quick: bool = False


# section -> (runs, what makes it); the runs are few where a run is long, many where little differs
SECTIONS: dict[str, tuple[int, Callable[[Setting], str]]] = {
    'forward': (3, lambda s: forward.report('ATDLight', *s.size, s.runs, s.backends)),
    'forward-avx2': (3, lambda s: forward.target_report('avx2', *s.size, s.runs)),
    'savings': (5, lambda s: forward.savings_report(('category',), *s.size, s.runs, s.backends[0])),
    'savings-window': (5, lambda s: forward.savings_report(('category', 'window'), *s.size, s.runs, s.backends[0])),
    'savings-where': (3, lambda s: forward.where_report(*s.size, s.runs, s.backends[0])),
    'variants': (1, lambda s: forward.variants_report(*s.size, s.runs, s.backends[0])),
    'forward-v2': (3, lambda s: forward.report('ATDLightV2', *s.size, s.runs, s.backends, brief=True)),
    'frames': (3, lambda s: frames.report('ATDLight', 4, s.runs, [s.size] if s.quick else frames.SIZES)),
    'frames-side-by-side': (
        1,
        lambda s: frames.report_side_by_side(
            'ATDLight', *((2, s.runs, [s.size]) if s.quick else (64, s.runs, frames.SIZES[:2]))
        ),
    ),
    'training-step': (3, lambda s: train_step.report(*((1, 16) if s.quick else (4, 48)), s.runs, s.backends)),
    'memory': (
        1,
        lambda s: memory.report({'forward': ('forward', 1, *s.size)} if s.quick else memory.CASES, s.backends),
    ),
    'peers': (3, lambda s: peers.report(*s.size, s.runs, 120, ['SPAN', peers.FLOOR] if s.quick else None)),
}
MADE = re.compile(r'<!-- begin (\S+) -->\nMade by .*? in ([\d.]+) minutes')


def add_up(document: Path) -> str:
    """What the sections of a document say of their time."""
    minutes = {name: float(m) for name, m in MADE.findall(document.read_text(encoding='utf-8')) if name in SECTIONS}
    rows = [[f'`{name}`', f'{m:.1f}'] for name, m in minutes.items()]
    return table(['section', 'minutes'], [*rows, ['together', f'{sum(minutes.values()):.1f}']])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-o', '--output', type=Path, help='the page (default: docs/performance.md)')
    parser.add_argument('--runs', type=int, help='of each section (default: as many as suit it)')
    parser.add_argument('--only', nargs='+', default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument('--quick', action='store_true', help='32×48, one run: whether it works, not how fast')
    args = parser.parse_args()
    if args.quick and args.output is None:
        parser.error('--quick wants -o: what it prints are no figures for docs/performance.md')
    output = args.output or Path('docs/performance.md')
    backends = [name for name in ('native', 'torch', 'reference') if dispatch.available(name) is None]
    command = shlex.join(['python', 'benchmarks/performance.py', *sys.argv[1:]])
    for name in args.only:
        print(f'{name} …', file=sys.stderr, flush=True)
        runs, make = SECTIONS[name]
        size = (32, 48) if args.quick else (180, 320)
        start = time.perf_counter()
        torch.set_grad_enabled(True)
        try:
            text = make(Setting(args.runs or (1 if args.quick else runs), backends, size, args.quick))
        except UserError as e:
            sys.exit(f'{name}: {e}')
        minutes = (time.perf_counter() - start) / 60
        made = f'Made by `{command}` in {minutes:.1f} minutes on this machine: {machine()}; default allocator.'
        write_section(output, name, f'{made}\n\n{text}')
        write_section(output, 'time', add_up(output))
        print(f'{name}: {minutes:.1f} minutes', file=sys.stderr, flush=True)


if __name__ == '__main__':
    main()
