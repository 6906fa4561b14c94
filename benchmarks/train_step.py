"""A training step on the CPU (forward, L1 loss, backward, AdamW): every backend against the reference.

python benchmarks/train_step.py [--batch 4] [--patch 48] [--runs 5] [--backends native torch reference]

Or this checkout against another one with its kernels built (git worktree add ../before COMMIT), PPATDLight, in turn:

OMP_NUM_THREADS=1 python benchmarks/train_step.py --against ../before [--runs 15]
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import alternate, machine, median, on, photograph, ratio, table

from ppsr.archs import ATDLight, PPATDLight
from ppsr.ops import dispatch


def patches(batch: int, size: int) -> torch.Tensor:
    """(batch, 3, size, size) cut from photographs."""
    image = photograph('astronaut', 4 * size, 4 * size)[0]
    cells = [image[:, y : y + size, x : x + size] for y in range(0, 4 * size, size) for x in range(0, 4 * size, size)]
    return torch.stack([cells[(5 * i) % 16] for i in range(batch)])


def step(net, lq: torch.Tensor, gt: torch.Tensor):
    """A function that makes one step."""
    optimizer = torch.optim.AdamW(net.parameters(), 2e-4, betas=(0.9, 0.9))

    def run():
        optimizer.zero_grad()
        torch.nn.functional.l1_loss(net(lq), gt).backward()
        optimizer.step()

    return run


def report(batch: int, size: int, runs: int, backends: list[str]) -> str:
    torch.manual_seed(0)
    torch.set_grad_enabled(True)
    lq = patches(batch, size)
    gt = torch.rand(batch, 3, 4 * size, 4 * size)
    dense, pp = step(ATDLight(), lq, gt), step(PPATDLight(), lq, gt)
    cases = {f'ATDLight, {name}': on(name, dense) for name in backends}
    cases |= {f'PPATDLight, {backends[0]}': on(backends[0], pp)}
    seconds = alternate(cases, runs)
    last = seconds[f'ATDLight, {backends[-1]}']
    rows = [[name, f'{median(s):.2f} s', f'{1 / ratio(s, last):.1f}×'] for name, s in seconds.items()]
    return '\n'.join(
        [f'## Training step, {batch} × {size}×{size}', '', table(['', 'median', f'against {backends[-1]}'], rows), '']
    )


def serve(batch: int, size: int) -> None:
    """Make a step for every line of standard input and print its seconds, of processor time and by the clock."""
    from ppsr.runtime import tune_process

    tune_process()  # as the command line does
    torch.manual_seed(0)
    run = step(PPATDLight(), patches(batch, size), torch.rand(batch, 3, 4 * size, 4 * size))
    run()
    print('ready', flush=True)
    for _ in sys.stdin:
        processor, clock = time.process_time(), time.perf_counter()
        run()
        print(time.process_time() - processor, time.perf_counter() - clock, flush=True)


def against(other: Path, batch: int, size: int, runs: int) -> str:
    """Steps of another checkout and of this one in turn, each in a process of its own."""
    script = Path(__file__).resolve()
    command = [sys.executable, str(script), '--serve', '--batch', str(batch), '--patch', str(size)]
    checkouts = {'before': other.resolve(), 'now': script.parent.parent}
    processes = {
        name: subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {'PYTHONPATH': str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, folder in checkouts.items()
    }
    seconds = {name: [] for name in processes}
    for process in processes.values():
        if process.stdout.readline() != 'ready\n':
            raise SystemExit('a checkout makes no step: are its kernels built?')
    for _ in range(runs):
        for name, process in processes.items():
            print(file=process.stdin, flush=True)
            seconds[name].append([float(x) for x in process.stdout.readline().split()])
    for process in processes.values():
        process.stdin.close()
        process.wait()
    rows = []
    for i, what in enumerate(('processor time', 'clock')):
        before, now = ([s[i] for s in seconds[name]] for name in ('before', 'now'))
        rows.append([what, f'{median(before):.2f} s', f'{median(now):.2f} s', f'{ratio(before, now):.2f}×'])
    title = f'## Training step of PPATDLight, {batch} × {size}×{size}, against another checkout'
    return '\n'.join([title, '', table(['', 'before', 'now', 'as fast'], rows), ''])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--patch', type=int, default=48)
    parser.add_argument('--runs', type=int, default=5)
    usable = [name for name in ('native', 'torch', 'reference') if dispatch.available(name) is None]
    parser.add_argument('--backends', nargs='+', default=usable, choices=usable)
    parser.add_argument('--against', type=Path, metavar='FOLDER', help='another checkout of this repository')
    parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.batch, args.patch)
        sys.exit()
    print(machine(), '\n')
    if args.against:
        print(against(args.against, args.batch, args.patch, args.runs))
        sys.exit()
    print(report(args.batch, args.patch, args.runs, args.backends))
