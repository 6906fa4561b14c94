"""Peak memory on the CPU, each case in a process of its own: forward at several sizes, training at the published size.

    python benchmarks/memory.py [--cases forward large train] [--backends native torch reference]

The figure is the process's peak resident set minus what it had before the first forward (Python, torch, the weights).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from common import machine, table

from ppsr.ops import dispatch

# name -> what is run: (kind, batch, height, width)
CASES = {
    'forward': ('forward', 1, 180, 320),
    'large': ('forward', 1, 540, 960),
    'train': ('train', 32, 64, 64),
}


def measure(kind: str, batch: int, height: int, width: int, backend: str) -> dict:
    """Run one case in this process; returns seconds and GiB."""
    import psutil
    import torch

    from ppsr.archs import ATDLight
    from ppsr.ops import use_backend
    from ppsr.runtime import tune_process

    if kind == 'train':
        tune_process()  # as the command line does; the forward is measured with the default allocator
    torch.manual_seed(0)
    net = ATDLight(use_checkpoint=kind == 'train')
    lq = torch.rand(batch, 3, height, width)
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    with use_backend(backend):
        if kind == 'train':
            net(lq).square().mean().backward()
        else:
            with torch.no_grad():
                net.eval()(lq)
    seconds = time.perf_counter() - start
    with open('/proc/self/status') as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith('VmHWM'))
    return {'seconds': seconds, 'gib': (peak - before) / 2**30}


def report(cases: dict[str, tuple[str, int, int, int]], backends: list[str]) -> str:
    """A Markdown table of cases like those of CASES."""
    rows = []
    for case, (kind, batch, height, width) in cases.items():
        for backend in backends:
            if backend == 'reference' and case != 'forward':
                continue  # would not fit or not end
            arguments = json.dumps([kind, batch, height, width, backend])
            code = f'import json, memory; print(json.dumps(memory.measure(*json.loads({arguments!r}))))'
            out = subprocess.run(
                [sys.executable, '-c', code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
            )
            result = json.loads(out.stdout.splitlines()[-1])
            what = f'{batch} × {height}×{width}, checkpointing' if kind == 'train' else f'{width}×{height}'
            per_pixel = 1e6 * result['seconds'] / (batch * height * width)
            rows.append(
                [kind, what, backend, f'{result["gib"]:.2f} GiB', f'{result["seconds"]:.1f} s', f'{per_pixel:.1f} µs']
            )
    header = ['', 'input', 'backend', 'peak', 'time (first call)', 'per input pixel']
    return '\n'.join(['## Memory', '', table(header, rows), ''])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', nargs='+', default=list(CASES), choices=list(CASES))
    usable = [name for name in ('native', 'torch', 'reference') if dispatch.available(name) is None]
    parser.add_argument('--backends', nargs='+', default=usable, choices=usable)
    args = parser.parse_args()
    print(machine(), '\n')
    print(report({name: CASES[name] for name in args.cases}, args.backends))
