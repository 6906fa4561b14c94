"""What half precision costs in PSNR against float32, and what it saves in time: `ppsr upscale --dtype`, nothing exempt.

python benchmarks/half_precision.py --data datasets [--sets Set5 Set14] [--dtypes bf16] [--device cpu]
"""

import argparse
from pathlib import Path
from statistics import mean

import torch
from common import add_document, alternate, as_image, document, image_pairs, ratio, table

import ppsr  # noqa: F401, registers the archs
from ppsr.device import in_precision, resolve_device, resolve_dtype, torch_as_it_comes
from ppsr.errors import UserError
from ppsr.ops.dispatch import no_bf16
from ppsr.pictures.compare import psnr_ssim
from ppsr.weights import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', type=Path, required=True, help='folder of data sets: SET/HR')
    parser.add_argument('--sets', nargs='+', default=['Set5', 'Set14', 'BSD100'])
    parser.add_argument('--dtypes', nargs='+', default=['bf16'], choices=['bf16', 'fp16'])
    parser.add_argument('--device', default='auto')
    parser.add_argument('--model', help='weights file or name (default: the shipped ones)')
    add_document(parser)
    args = parser.parse_args()
    with document(args):
        print(table(['data set', 'images', 'float32', *HEADER], measure(args)))


HEADER = ('precision', 'PSNR', 'loss', 'worst image', 'largest change', 'float32 / time')


def measure(args: argparse.Namespace) -> list[list[str]]:
    device = resolve_device(args.device)
    dtypes = {'fp32': torch.float32} | {name: resolve_dtype(name, device) for name in args.dtypes}
    if device.type == 'cpu' and 'bf16' in dtypes and (reason := no_bf16()) is not None:
        raise UserError(f'bf16 is computed in fp32 here: {reason}.')
    net = load_model(args.model, pure_pass=False, device=device)
    rows = []
    for name in args.sets:
        images = [
            compare(net, dtypes, device, lq, gt) for _, lq, gt in image_pairs(args.data / name / 'HR', net.upscale)
        ]
        exact = mean(image['fp32'][0] for image in images)
        for dtype in args.dtypes:
            psnr, change, times = zip(*(image[dtype] for image in images))
            losses = [image['fp32'][0] - image[dtype][0] for image in images]
            figures = f'{mean(psnr):.3f} dB', f'{mean(losses):+.4f} dB', f'{max(losses):+.4f} dB', f'{max(change):.3f}'
            rows.append([name, len(images), f'{exact:.3f} dB', dtype, *figures, f'{mean(times):.2f}'])
    return rows


def compare(net, dtypes, device, lq, gt) -> dict[str, tuple[float, float, float]]:
    """Precision -> PSNR, largest change of a sample (0 to 1), how many times as fast as float32: of one image."""
    results, lq = {}, lq.to(device)

    def run(name: str):
        with torch.inference_mode(), torch_as_it_comes(), in_precision(dtypes[name], device):
            results[name] = net(lq).float().cpu()[0].clamp(0, 1)

    seconds = alternate({name: lambda name=name: run(name) for name in dtypes}, runs=1, warmup=1)
    return {
        name: (
            psnr_ssim(as_image(sr), gt, net.upscale)[0],
            (sr - results['fp32']).abs().max().item(),
            ratio(seconds['fp32'], seconds[name]),
        )
        for name, sr in results.items()
    }


if __name__ == '__main__':
    main()
