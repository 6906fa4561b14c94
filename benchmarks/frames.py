"""Frames per second of small pictures on the CPU, one after another, dense and with Pure-Pass.

    python benchmarks/frames.py [--arch ATDLight] [--frames 4] [--runs 3]
    python benchmarks/frames.py --side-by-side [--frames 64] [--sizes 90x160]

Frames are parts of a photograph that the window moves over, so that no two are alike. Networks alone: no reading,
no writing. With --side-by-side: one after another on all cores against side by side on one each, of arrays
(Upscaler.upscale_many) and of PNG files (ppsr upscale), and the most that sharing out can give: the speed of one
thread, times their number. Weights are random, as in forward.py. Cases in turn, medians.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from common import alternate, as_image, machine, median, photograph, ratio, table
from forward import ARCHS, networks

from ppsr.images import write_file
from ppsr.pictures import side_by_side
from ppsr.pictures.batch import plan_jobs, run_jobs
from ppsr.pictures.upscaler import Upscaler
from ppsr.runtime import threads, tune_process

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


def report_side_by_side(arch: str, count: int, runs: int, sizes: Sequence[tuple[int, int]]) -> str:
    """A Markdown table; `count` frames a run, all of which must come out equal."""
    cores, rows = torch.get_num_threads(), []

    def one_after_another(run):
        with mock.patch.object(side_by_side, 'SMALL', 0):
            return run()

    def together(run):
        with mock.patch.object(side_by_side, 'SMALL', 2**31):  # beyond the limit, too: where does it end to pay?
            return run()

    for net, kind in zip(networks(arch), ('dense', 'Pure-Pass')):
        upscaler = Upscaler(net, device='cpu')
        for height, width in sizes:
            wide = as_image(photograph('coffee', height, width + count)[0])
            frames = [np.ascontiguousarray(wide[:, i : i + width]) for i in range(count)]
            with tempfile.TemporaryDirectory() as folder:
                for i, frame in enumerate(frames):
                    write_file(Path(folder) / 'in' / f'{i:03}.png', frame)

                def files(folder=folder):
                    plan = plan_jobs([f'{folder}/in'], f'{folder}/out')
                    summary = run_jobs(upscaler, plan, overwrite=True, progress=False)  # noqa: B023
                    if len(summary.done) != count:
                        raise SystemExit(f'{count - len(summary.done)} frames failed.')

                def arrays(frames=frames):
                    return upscaler.upscale_many(frames)  # noqa: B023

                def single():
                    with threads(1):
                        return arrays()

                same = all(map(np.array_equal, one_after_another(arrays), together(arrays)))
                if not same:
                    raise SystemExit('Frames differ.')
                cases = {
                    'arrays': lambda: one_after_another(arrays),
                    'arrays together': lambda: together(arrays),
                    'single': single,
                    'files': lambda: one_after_another(files),
                    'files together': lambda: together(files),
                }
                s = alternate(cases, runs, warmup=0)
            speed = {name: f'{count / median(seconds):.2f}' for name, seconds in s.items()}
            gain = {name: f'{ratio(s[name], s[f"{name} together"]):.2f}×' for name in ('arrays', 'files')}
            most = f'{cores * ratio(s["arrays"], s["single"]):.2f}×'
            row = [f'{width}×{height} {kind}', speed['arrays'], speed['arrays together'], gain['arrays'], most]
            rows.append([*row, speed['files'], speed['files together'], gain['files']])
    header = [
        f'{arch}, input',
        'arrays, frames/s',
        'side by side',
        'gain',
        'at most',
        'files, frames/s',
        'side by side',
    ]
    return '\n'.join(
        [f'## Small pictures side by side, {arch} ×4, {count} frames', '', table([*header, 'gain'], rows), '']
    )


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='ATDLight', choices=ARCHS)
    parser.add_argument('--frames', type=int, help='a run (4, side by side 64)')
    parser.add_argument('--runs', type=int, default=3)
    parser.add_argument('--side-by-side', action='store_true')
    parser.add_argument('--sizes', nargs='+', metavar='HxW', default=[f'{h}x{w}' for h, w in SIZES])
    args = parser.parse_args()
    sizes = [tuple(map(int, size.split('x'))) for size in args.sizes]
    print(machine(), '\n')
    if args.side_by_side:
        tune_process()  # as the command does
        print(report_side_by_side(args.arch, args.frames or 64, args.runs, sizes))
    else:
        print(report(args.arch, args.frames or 4, args.runs, sizes))
