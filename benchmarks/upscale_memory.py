"""Memory of ``ppsr upscale`` on the CPU: bytes per input pixel of the network, peak of the process under --max-memory.

python benchmarks/upscale_memory.py [--limits 1300M 2G] [--size 360 480]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import machine, photograph, table
from PIL import Image

import ppsr  # noqa: F401, registers the archs
from ppsr.ops import dispatch, use_backend
from ppsr.pictures.memory import measure_bytes_per_pixel
from ppsr.runtime import tune_process
from ppsr.weights import load_model


def upscale(source: Path, target: Path, limit: str) -> tuple[float, float]:
    """Run the command; peak resident set of its process in MiB, seconds."""
    start = time.perf_counter()
    command = [sys.executable, '-m', 'ppsr', 'upscale', '-i', source, '-o', target, '--device', 'cpu']
    process = subprocess.Popen([*command, '--max-memory', limit], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f'{limit}: the command failed')
    return usage.ru_maxrss / 1024, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--limits', nargs='+', default=['1300M', '2G'])
    parser.add_argument('--size', type=int, nargs=2, default=[360, 480], metavar=('H', 'W'))
    args = parser.parse_args()
    print(machine(), '\n')
    rows = []
    with tempfile.TemporaryDirectory() as folder:  # first, while this process is small
        source = Path(folder) / 'in.png'
        x = photograph('coffee', *args.size)[0].permute(1, 2, 0)
        Image.fromarray((x * 255).byte().numpy()).save(source)
        for limit in args.limits:
            peak, seconds = upscale(source, Path(folder) / f'{limit}.png', limit)
            rows.append([f'{args.size[1]}×{args.size[0]}', limit, f'{peak:,.0f} MiB', f'{seconds:.1f} s'])
    print(table(['input', '--max-memory', 'peak of the process', 'time'], rows), '\n')

    tune_process()  # as the command does
    net, rows = load_model(None), []
    for backend in ('native', 'torch'):
        if dispatch.available(backend) is None:
            with use_backend(backend), torch.inference_mode():
                size = measure_bytes_per_pixel(net, torch.device('cpu'))
            rows.append([backend, f'{size / 1024:.2f} KiB'])
    print(table(['backend', 'of the network, per input pixel'], rows))


if __name__ == '__main__':
    main()
