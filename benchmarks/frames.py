"""Frames per second of small pictures on the CPU, one after another, dense and with Pure-Pass.

    python benchmarks/frames.py [--arch ATDLight] [--frames 4] [--runs 3]

Frames are parts of a photograph that the window moves over, so that no two are alike. Networks alone: no reading,
no writing. Weights are random, as in forward.py. Cases in turn, medians.
"""

import argparse
from collections.abc import Sequence

import torch
from common import alternate, machine, median, photograph, ratio, table
from forward import ARCHS, networks

SIZES = ((54, 96), (90, 160), (180, 320))  # height, width


def report(arch: str, count: int, runs: int, sizes: Sequence[tuple[int, int]] = SIZES) -> str:
    """A Markdown table; `count` frames a run of each of the sizes (height, width)."""
    dense, pp = networks(arch)
    rows = []
    with torch.inference_mode():
        for height, width in sizes:
            wide = photograph('coffee', height, width + count)
            frames = [wide[..., i : i + width].contiguous() for i in range(count)]
            pure = sum(pp.pure_mask(frame).float().mean().item() for frame in frames) / count
            cases = {
                'dense': lambda frames=frames: [dense(frame) for frame in frames],
                'pp': lambda frames=frames: [pp(frame) for frame in frames],
            }
            s = alternate(cases, runs)
            speeds = [f'{count / median(s[name]):.2f}' for name in cases]
            rows.append([f'{width}×{height}', *speeds, f'{pure:.1%}', f'{ratio(s["dense"], s["pp"]):.2f}×'])
    header = [f'{arch}, input', 'dense, frames/s', 'Pure-Pass, frames/s', 'pure', 'Pure-Pass against dense']
    return '\n'.join([f'## Frames per second, {arch} ×4', '', table(header, rows), ''])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='ATDLight', choices=ARCHS)
    parser.add_argument('--frames', type=int, default=4, help='a run')
    parser.add_argument('--runs', type=int, default=3)
    args = parser.parse_args()
    print(machine(), '\n')
    print(report(args.arch, args.frames, args.runs))
