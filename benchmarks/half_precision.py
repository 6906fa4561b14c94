"""What bfloat16 and float16 autocast cost: difference from float32, PSNR, time, over a folder of HR images.

python benchmarks/half_precision.py --data Set5/HR [--dtypes bfloat16 float16] [--device cpu]
"""

import argparse
import time
from pathlib import Path

import torch
from common import add_document, as_image, document, image_pairs

import ppsr  # noqa: F401, registers the archs
from ppsr.pictures.compare import psnr_ssim
from ppsr.weights import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', type=Path, required=True, help='folder of HR images')
    parser.add_argument('--dtypes', nargs='+', default=['bfloat16', 'float16'], choices=['bfloat16', 'float16'])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--model', help='weights file or name (default: the shipped ones)')
    add_document(parser)
    args = parser.parse_args()
    with document(args):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    net = load_model(args.model, device=args.device)

    def run(lq: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        with torch.inference_mode(), torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32):
            sr = net(lq.to(args.device)).float().cpu()[0].clamp(0, 1)
        return sr, time.perf_counter() - start

    print('| image | dtype | PSNR | float32 | mean \\|Δ\\| | max \\|Δ\\| | PSNR between | time against float32 |')
    print('|---|---|---|---|---|---|---|---|')
    for path, lq, gt in image_pairs(args.data, net.upscale):
        run(lq, torch.float32)
        exact, seconds = run(lq, torch.float32)
        for name in args.dtypes:
            sr, taken = run(lq, getattr(torch, name))
            difference = (sr - exact).abs()
            between = -10 * torch.log10(difference.square().mean()).item()
            psnr = [psnr_ssim(as_image(x), gt, net.upscale)[0] for x in (sr, exact)]
            print(
                f'| {path.stem} | {name} | {psnr[0]:.3f} | {psnr[1]:.3f} | {difference.mean():.4f} | '
                f'{difference.max():.4f} | {between:.1f} dB | {taken / seconds:.1f} |',
                flush=True,
            )


if __name__ == '__main__':
    main()
