"""Weights for another scale from those that there are: the body stays, the upsampler is fitted in closed form.

    python -m ppsr.training.upsampler -n PPATDLight_x4 --scale 2 --data datasets/cpu_training -o x2.safetensors

The upsampler is one convolution: given the features of the body, the HR image is linear in its weights, so that the
best ones (in the mean squared error, over crops of a data set that ``ppsr prepare`` made, with a share of drawings)
solve a system of 9·C + 1 equations. That takes minutes, and is where a training of everything begins.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppsr.data.paired_sr_dataset import PairedSRDataset
from ppsr.data.synthetic_graphics import SyntheticGraphics
from ppsr.errors import UserError
from ppsr.weights import load_model, read_checkpoint, resolve, save_checkpoint

__all__ = ['fit_upsampler', 'with_scale']


def fit_upsampler(net: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], ridge: float = 1e-6) -> None:
    """Set the weights of ``net.upsample[0]`` to those with the least mean squared error.

    Args:
        net: a network of this package, in eval mode, of the scale s of the pairs.
        pairs: LR (1, 3, h, w) and HR (1, 3, s·h, s·w) images, RGB in [0, 1].
        ridge: added to the diagonal of the equations, times its mean.

    Raises:
        ValueError: no pairs.
    """
    conv, scale, seen = net.upsample[0], net.upscale, []
    handle = net.upsample.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    size = conv.in_channels * 9 + 1
    gram = torch.zeros(size, size, dtype=torch.float64)
    right = torch.zeros(size, conv.out_channels, dtype=torch.float64)
    count = 0
    try:
        with torch.no_grad():
            for lq, gt in pairs:
                seen.clear()
                net(lq)
                h, w = lq.shape[-2:]
                patches = F.unfold(seen[0], 3, padding=1).view(1, size - 1, *seen[0].shape[-2:])[..., :h, :w]
                x = torch.cat([patches, torch.ones(1, 1, h, w)], 1).flatten(2)[0].double()
                y = F.pixel_unshuffle(gt - net.mean, scale).flatten(2)[0].double()
                gram += x @ x.T
                right += x @ y.T
                count += h * w
    finally:
        handle.remove()
    if not count:
        raise ValueError('an upsampler is fitted to pairs of images; there are none')
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, right).float()
    with torch.no_grad():
        conv.weight.copy_(solution[:-1].T.reshape(conv.weight.shape))
        conv.bias.copy_(solution[-1])


def with_scale(net: nn.Module, config: dict, scale: int) -> tuple[nn.Module, dict]:
    """A network of another scale with the body of `net` and a new upsampler; and its configuration."""
    config = config | {'upscale': scale}
    other = type(net)(**{name: value for name, value in config.items() if name != 'type'}).eval()
    state = {name: value for name, value in net.state_dict().items() if not name.startswith('upsample.')}
    other.load_state_dict(state, strict=False)
    return other, config


def crops(data: Path, scale: int, count: int, size: int, drawings: float, meta_info: Path | None = None, seed: int = 0):
    """`count` random pairs of crops of `size` LR pixels, a share of them drawings."""
    opt = {'name': data.name, 'phase': 'train', 'scale': scale, 'gt_size': size * scale}
    opt |= {'dataroot_gt': str(data / 'HR'), 'dataroot_lq': str(data / f'LRbicx{scale}')}
    if meta_info is not None:
        opt['meta_info_file'] = str(meta_info)
    photographs, graphics = PairedSRDataset(opt), SyntheticGraphics(opt)
    rng = np.random.default_rng(seed)
    for number in range(count):
        drawn = rng.random() < drawings
        index = int(rng.integers(len(photographs)))
        sample = graphics[number % len(graphics)] if drawn else photographs[index]
        yield sample['lq'][None], sample['gt'][None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-n', '--model', default='PPATDLight_x4', help='weights whose body is taken: a name or a file')
    parser.add_argument('--scale', type=int, required=True, help='of the new weights')
    parser.add_argument('--data', type=Path, required=True, help='a data set in the layout of ppsr prepare')
    parser.add_argument('--meta-info', type=Path, metavar='FILE', help='names of the images to use (default: all)')
    parser.add_argument('--crops', type=int, default=200, help='how many (default: 200)')
    parser.add_argument('--size', type=int, default=64, help='side of a crop in LR pixels (default: 64)')
    parser.add_argument('--drawings', type=float, default=0.12, help='share of drawings (default: 0.12)')
    parser.add_argument('-o', '--output', type=Path, required=True, help='.safetensors')
    args = parser.parse_args()
    checkpoint = read_checkpoint(resolve(args.model))
    if checkpoint.config is None:
        raise UserError(f'{args.model}: the file does not say its configuration; convert it with ppsr convert first.')
    net, config = with_scale(load_model(args.model), checkpoint.config, args.scale)
    fit_upsampler(net, crops(args.data, args.scale, args.crops, args.size, args.drawings, args.meta_info))
    facts = checkpoint.facts | {
        'name': args.output.stem,
        'upsampler': f'fitted in closed form to {args.crops} crops of {args.size}x{args.size} LR pixels, '
        f'{args.drawings:.0%} drawings; everything else is that of {args.model}',
    }
    save_checkpoint(args.output, net.state_dict(), config, facts)


if __name__ == '__main__':
    main()
