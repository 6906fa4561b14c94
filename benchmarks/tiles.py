"""What tiles cost in decibels: PSNR of the whole image and of several tile sizes, over folders of HR images.

python benchmarks/tiles.py --data Set14/HR BSD100/HR --first 25 --tiles 96/32 64/32 64/16 48/16
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import add_document, as_image, document, image_pairs

import ppsr  # noqa: F401, registers the archs
from ppsr.pictures.compare import psnr_ssim
from ppsr.tiling import tiled_forward
from ppsr.weights import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', nargs='+', type=Path, required=True, help='folders of HR images')
    parser.add_argument('--first', type=int, help='only the first N images of each folder, by name')
    parser.add_argument('--tiles', nargs='+', default=['96/32', '64/32', '64/16', '48/16'], help='TILE/OVERLAP')
    parser.add_argument('--model', help='weights file or name (default: the shipped ones)')
    add_document(parser)
    args = parser.parse_args()
    with document(args):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    net = load_model(args.model)
    settings = [(0, 0)] + [tuple(int(n) for n in text.split('/')) for text in args.tiles]
    print(
        '| images | tile / overlap | PSNR | change | PSNR of tiled against whole | GMACs |\n|---|---|---|---|---|---|'
    )
    for folder in args.data:
        rows = {setting: [] for setting in settings}
        for _, lq, gt in image_pairs(folder, net.upscale, args.first):
            for setting in settings:
                with torch.inference_mode():
                    sr, totals = tiled_forward(net, lq, *setting)
                image = as_image(sr[0])
                if setting == (0, 0):
                    whole = image
                same = np.array_equal(image, whole)
                near = float('inf') if same else psnr_ssim(image, whole, net.upscale)[0]
                rows[setting].append((psnr_ssim(image, gt, net.upscale)[0], near, totals.macs / 1e9))
        name = f'{folder.parent.name} ({len(rows[0, 0])})'
        base = np.mean([row[0] for row in rows[0, 0]])
        for (tile, overlap), values in rows.items():
            psnr, near, gmacs = np.mean(values, axis=0)
            label = f'{tile} / {overlap}' if tile else 'whole'
            print(f'| {name} | {label} | {psnr:.3f} | {psnr - base:+.3f} | {near:.1f} | {gmacs:.2f} |', flush=True)


if __name__ == '__main__':
    main()
