"""Memory of ``ppsr upscale`` on the CPU: bytes per input pixel of the network, peak of the process under --max-memory.

python benchmarks/upscale_memory.py [--limits 1300M 2G] [--size 360 480]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import add_document, document, median, photograph, table
from PIL import Image

import ppsr  # noqa: F401, registers the archs
from ppsr.ops import dispatch, use_backend
from ppsr.pictures.memory import measure_bytes_per_pixel
from ppsr.runtime import tune_process
from ppsr.weights import load_model

# The command, and the peak of its process as it ends. Not what the system tells its parent: while it exits, a CUDA
# build of PyTorch reads another 0.1 GiB of its own libraries, which is no memory that anybody asked for.
COMMAND = """
import atexit, runpy, sys
atexit.register(lambda: print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))))
runpy.run_module('ppsr', run_name='__main__', alter_sys=True)
"""


def upscale(source: Path, target: Path, limit: str) -> tuple[float, float]:
    """Run the command; peak resident set of its process in MiB, seconds."""
    start = time.perf_counter()
    arguments = ['upscale', '-i', source, '-o', target, '--device', 'cpu', '--max-memory', limit]
    process = subprocess.run([sys.executable, '-c', COMMAND, *arguments], capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f'{limit}: the command failed: {process.stderr}')
    return int(process.stdout.split()[-1]) / 1024, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--limits', nargs='+', default=['1300M', '2G'])
    parser.add_argument('--runs', type=int, default=3)
    parser.add_argument('--size', type=int, nargs=2, default=[360, 480], metavar=('H', 'W'))
    add_document(parser)
    args = parser.parse_args()
    with document(args):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:  # first, while this process is small
        source = Path(folder) / 'in.png'
        x = photograph('coffee', *args.size)[0].permute(1, 2, 0)
        Image.fromarray((x * 255).byte().numpy()).save(source)
        for limit in args.limits:
            runs = [upscale(source, Path(folder) / f'{limit}_{i}.png', limit) for i in range(args.runs)]
            peaks = [peak for peak, _ in runs]
            seconds = median([seconds for _, seconds in runs])
            between = f'{min(peaks):,.0f} to {max(peaks):,.0f} MiB'
            rows.append([f'{args.size[1]}×{args.size[0]}', limit, between, f'{seconds:.1f} s'])
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
