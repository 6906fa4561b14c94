"""Weights with a new upsampler: the body stays, the upsampler is fitted in closed form.

    python -m ppsr.training.upsampler -n PPATDLight_x4 --scale 2 --data datasets/cpu_training -o x2.safetensors

The upsampler is one convolution: given the features of the body, the HR image is linear in its weights, so that the
best ones (in the mean squared error, over crops of a data set that ``ppsr prepare`` made, with a share of drawings)
solve a system of 9·C + 1 equations. That takes minutes, and is where a training for another scale begins.

One-colour pictures are part of the system. They hold nothing to enlarge, and all errors that weights make of them come
from the zeros around the picture, which photographs, gray on the average, hardly show. Their equations are weighted
anew until no sample is off by more than `TOLERANCE`; for weights of the same scale the target for everything else is
what they give already, so that photographs hardly change.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppsr.archs.masked import MaskedNetwork
from ppsr.data.paired_sr_dataset import PairedSRDataset
from ppsr.data.synthetic_graphics import SyntheticGraphics
from ppsr.errors import UserError
from ppsr.paper.flatness import COLOURS, flatness
from ppsr.weights import guess_config, load_model, read_checkpoint, require_writable, resolve, save_checkpoint

__all__ = ['fit_upsampler', 'one_colour_pictures', 'with_scale']

TOLERANCE = 1.5 / 255  # of one-colour pictures, before rounding
ROUNDS = 30  # of weighting their pixels anew
SHARE = 0.03  # weight of their pixels in the first round, all of them against all others
SIDES = (16, 24, 40)


def fit_upsampler(
    net: MaskedNetwork,
    pairs: Iterable[tuple[Tensor, Tensor]],
    ridge: float = 1e-6,
    flat: Iterable[Tensor] = (),
) -> None:
    """Set the weights of ``net.upsample[0]`` to those with the least mean squared error.

    Args:
        net: a network of this package, in eval mode, of the scale s of the pairs.
        pairs: LR (1, 3, h, w) and HR (1, 3, s·h, s·w) images, RGB in [0, 1].
        ridge: added to the diagonal of the equations, times its mean.
        flat: one-colour LR pictures (B, 3, h, w) that have to keep their colours, in every way in which the network
            can exempt pixels.

    Raises:
        ValueError: no pairs.
    """
    size, outputs = net.upsample[0].in_channels * 9 + 1, net.upsample[0].out_channels
    gram, right = _sums((_equations(net, lq, gt) for lq, gt in pairs), size, outputs)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, right)
    equations = [part for pictures in flat for part in _flat_equations(net, pictures)]
    if equations:
        x, y = (torch.cat(parts) for parts in zip(*equations))
        weight = torch.full((len(x), 1), SHARE / len(x), dtype=torch.float64)
        for _ in range(ROUNDS):
            off = (x @ solution - y).abs().amax(1, keepdim=True)
            if off.max() <= TOLERANCE:
                break
            weight *= (off / TOLERANCE).clamp(min=1)
            weighted = weight * x
            solution = torch.linalg.solve(gram + weighted.T @ x, right + weighted.T @ y)
    with torch.no_grad():
        net.upsample[0].weight.copy_(solution[:-1].T.reshape(net.upsample[0].weight.shape))
        net.upsample[0].bias.copy_(solution[-1])


def _equations(net: MaskedNetwork, lq: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
    """The upsampler's inputs (B·h·w, 9·C + 1) and what it should make of them (B·h·w, 3·s²), in float64."""
    seen = []
    handle = net.upsample.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            net(lq)
    finally:
        handle.remove()
    (features,), (h, w) = seen, lq.shape[-2:]
    x = F.unfold(features, 3, padding=1).unflatten(2, features.shape[-2:])[..., :h, :w]  # without what was padded
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    y = F.pixel_unshuffle(gt - net.mean, net.upscale)
    return tuple(part.permute(0, 2, 3, 1).flatten(0, 2).double() for part in (x, y))


def _sums(equations: Iterable[tuple[Tensor, Tensor]], size: int, outputs: int) -> tuple[Tensor, Tensor]:
    """XᵀX and XᵀY, means over all equations."""
    gram = torch.zeros(size, size, dtype=torch.float64)
    right, count = torch.zeros(size, outputs, dtype=torch.float64), 0
    for x, y in equations:
        gram += x.T @ x
        right += x.T @ y
        count += len(x)
    if not count:
        raise ValueError('an upsampler is fitted to pairs of images; there are none')
    return gram / count, right / count


def _flat_equations(net: MaskedNetwork, pictures: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Those of one-colour pictures: dense, with the network's mask, and exempt from all that it can exempt from; of the
    pixels that are right already one in ten."""
    target = pictures[..., :1, :1].expand(-1, -1, *(side * net.upscale for side in pictures.shape[-2:]))
    settings = [(None, None)]
    if net.pure_pass is not None:
        settings += [(net.pure_pass, net.scopes[:1]), (net.pure_pass, None)][-len(net.scopes) :]
    conv = net.upsample[0]
    now = torch.cat([conv.weight.flatten(1), conv.bias[:, None]], 1).detach().double().T
    for mask, scope in settings:
        with net.exempting(mask, scope):
            x, y = _equations(net, pictures, target)
        wrong = (x @ now - y).abs().amax(1) > TOLERANCE / 2
        wrong[::10] = True
        yield x[wrong], y[wrong]


def one_colour_pictures(seed: int = 0, others: int = 24) -> Iterator[Tensor]:
    """Batches (B, 3, side, side) of one-colour pictures of several sides: those of :data:`ppsr.paper.flatness.COLOURS`,
    and as many `others`, most of them saturated."""
    generator = torch.Generator().manual_seed(seed)
    more = torch.rand(others, 3, generator=generator)
    more = torch.where(torch.rand(others, 3, generator=generator) < 0.6, more.round(), more)
    colours = torch.cat([torch.tensor(list(COLOURS.values())) / 255, more])
    for side in SIDES:
        yield colours[:, :, None, None].repeat(1, 1, side, side)


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


@torch.no_grad()
def _output(net: nn.Module, lq: Tensor) -> Tensor:
    return net(lq)


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
    try:
        _fit(args)
    except UserError as e:
        parser.error(str(e))


def _fit(args: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(resolve(args.model))
    if checkpoint.config is None:
        raise UserError(f'{args.model}: the file does not say its configuration; convert it with ppsr convert first.')
    # with the stand-in for window attention that the file may hold, whether or not it is what the file runs by default
    found = guess_config(checkpoint.state_dict, checkpoint.config['type'])
    whole = {name: found[name] for name in ('pp_scope', 'pp_window_compensation') if name in found}
    net = load_model(args.model, settings=whole)
    require_writable(args.output)
    pairs = crops(args.data, args.scale, args.crops, args.size, args.drawings, args.meta_info)
    fitted = f'{args.crops} crops of {args.size}x{args.size} LR pixels, {args.drawings:.0%} drawings'
    if args.scale == net.upscale:
        pairs = ((lq, _output(net, lq)) for lq, _ in pairs)
        fitted = f'what it gave for {fitted}'
    else:
        net, _ = with_scale(net, checkpoint.config | whole, args.scale)
    fit_upsampler(net, pairs, flat=one_colour_pictures())
    facts = checkpoint.facts | {
        'name': args.output.stem,
        'upsampler': f'fitted in closed form to {fitted} and one-colour pictures; everything else is that of '
        f'{args.model}',
    }
    save_checkpoint(args.output, net.state_dict(), checkpoint.config | {'upscale': args.scale}, facts)
    worst = max(max(off.values()) for off in flatness(net.exempt_nothing()).values())
    print(f'{args.output}: one-colour pictures are off by at most {worst} levels (run dense).')


if __name__ == '__main__':
    main()
