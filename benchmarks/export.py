"""Seconds of the network here and in other runtimes: native kernels, ONNX Runtime, OpenVINO, torch.compile.

python benchmarks/export.py [--size 320 180] [--runs 5] [--document docs/export.md]
Needs pip install 'ppsr[export]' openvino.

Two pictures: noise, in which nothing is pure, and one with flat columns; ×4 with the shipped weights. The file is made
in a temporary folder, and every runtime gets as many threads as PyTorch has here.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from common import add_document, alternate, document, median, noise, on, table

from ppsr.export.check import openvino, runtimes
from ppsr.export.onnx_file import export_onnx
from ppsr.weights import load_model


def partly_pure(height: int, width: int, share: float) -> torch.Tensor:
    """Noise with one flat region whose share of the pixels is pure, as near as whole columns of windows allow."""
    lq = noise(height, width)
    lq[..., : round(width * share)] = 0.5
    return lq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', type=int, nargs=2, default=(320, 180), metavar=('WIDTH', 'HEIGHT'))
    parser.add_argument('--share', type=float, default=0.4, help='of pure pixels in the second picture (default: 0.4)')
    parser.add_argument('--runs', type=int, default=5)
    parser.add_argument('--model', help='weights file or name (default: the shipped ones)')
    parser.add_argument('--no-compile', action='store_true', help='leave torch.compile out')
    add_document(parser)
    args = parser.parse_args()
    with document(args):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    width, height = args.size
    net = load_model(args.model)
    pictures = {'dense': noise(height, width), 'partly pure': partly_pure(height, width, args.share)}
    with torch.inference_mode():
        shares = {name: net.mask_of(lq).float().mean().item() for name, lq in pictures.items()}
    runs = {name: lambda lq, name=name: on(name, lambda: net(lq))() for name in ('native', 'torch')}
    if not args.no_compile:
        runs['torch.compile, native attention'] = torch.compile(net, dynamic=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.onnx'
        print('Making the ONNX file …', file=sys.stderr)
        export_onnx(net, path)
        loaders = runtimes()
        if openvino not in loaders:
            print('OpenVINO is left out: it is not installed (pip install openvino).', file=sys.stderr)
        for load in loaders:
            name, run = load(path)
            runs[name] = lambda lq, run=run: run(lq.numpy())
        rows = {name: [name] for name in runs}
        for picture, lq in pictures.items():
            print(f'Running {", ".join(runs)}: {picture} …', file=sys.stderr)
            with torch.inference_mode():
                seconds = alternate({name: lambda lq=lq, run=run: run(lq) for name, run in runs.items()}, args.runs)
            for name, values in seconds.items():
                rows[name].append(f'{median(values):.2f} s')
    header = ['', *(f'{share:.0%} pure' for share in shares.values())]
    print(f'{width}×{height}, ×{net.upscale}, medians of {args.runs} runs:\n')
    print(table(header, list(rows.values())))


if __name__ == '__main__':
    main()
