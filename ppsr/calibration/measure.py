"""``ppsr calibrate``: a stand-in for window attention where there is none, and the curve, into a new weight file."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor
from tqdm import tqdm

from ppsr.archs.build import build_network, masked_variant
from ppsr.archs.masked import MaskedNetwork
from ppsr.calibration.curve import AGAINST, KEY, Curve, Point
from ppsr.calibration.stand_in import fit_stand_ins
from ppsr.data.benchmark import find_images, read_pair
from ppsr.data.layout import find_sources
from ppsr.device import torch_defaults
from ppsr.errors import UserError
from ppsr.images import decode_rgb, to_image, to_tensor
from ppsr.masks import build_mask
from ppsr.metrics import psnr
from ppsr.registry import registered
from ppsr.weights import (
    Checkpoint,
    build_and_load,
    described,
    load_into,
    read_checkpoint,
    require_writable,
    resolve,
    save_checkpoint,
)

__all__ = ['FEWEST', 'THRESHOLDS', 'calibrate', 'evenly', 'load_with_stand_in', 'measure_curve']

FEWEST = 5  # images
MASK = 'gradient'  # loses least at equal saving (docs/results.md)
THRESHOLDS = (0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.13)  # of that mask
FIT_THRESHOLD = 0.08  # of the mask for which a stand-in is fitted
CROPS, SIDE = 64, 64  # of the fit
LARGEST = 128  # LQ pixels of a side; of larger images the middle is measured
BEST = 100.0  # dB: images that are equal but for a few samples are as good as equal
USUAL = 30.0  # dB of a dense output against a ground truth that nobody has


def calibrate(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    images: int = 20,
    thresholds: Sequence[float] = THRESHOLDS,
    refit: bool = False,
    ground_truth: bool = True,
    device: torch.device | str = 'cpu',
) -> tuple[Curve, bool]:
    """Write weights with a stand-in for window attention and the curve of their settings.

    Args:
        model: weight file, or the name of shipped weights.
        data: a folder of HR images in any layout that ``ppsr prepare`` knows; without ground truth, of LQ images.
        output: .safetensors.
        images: at most so many are measured.
        thresholds: of the mask `MASK`.
        refit: fit a stand-in where the file has one already.
        ground_truth: False: the images are inputs, and losses are estimated from the change of the output.
        device: to compute on.

    Returns:
        The curve, and whether a stand-in was fitted.

    Raises:
        UserError: no such weights, weights that have no window attention to exempt from, too few images, or an output
            that cannot be written.
    """
    output = Path(output)
    if output.suffix != '.safetensors':
        raise UserError(f'{output}: the curve is kept in .safetensors files; choose such a name.')
    checkpoint = read_checkpoint(resolve(model))
    net, config, has_stand_in = load_with_stand_in(checkpoint)
    net = net.to(device)
    sources = _find(Path(data), net.upscale if ground_truth else None)
    measured = evenly(sources, images)
    require_writable(output)
    facts = dict(checkpoint.facts)
    if fitted := refit or not has_stand_in:
        rest = [source for source in sources if source not in measured]
        crops = _crops(rest if len(rest) >= FEWEST else measured, net, ground_truth)
        fit_stand_ins(net, crops.to(device), build_mask(MASK, threshold=FIT_THRESHOLD).to(device))
        count, side = len(crops), crops.shape[-1]
        facts['stand_in'] = f'fitted in closed form to {count} crops of {side}×{side} pixels'
    names = ', '.join(dict.fromkeys(name for name, _ in measured))
    curve = measure_curve(net, [path for _, path in measured], names, thresholds, ground_truth)
    save_checkpoint(output, net.state_dict(), config, facts | {KEY: curve.as_fact()})
    return curve, fitted


def measure_curve(
    net: MaskedNetwork,
    paths: Sequence[Path],
    data: str,
    thresholds: Sequence[float] = THRESHOLDS,
    ground_truth: bool = True,
) -> Curve:
    """What the mask of the network, the colour mask, and the mask `MASK` lose and save with and without window
    attention in their scope.

    Args:
        net: with a stand-in for window attention, in eval mode; its own mask is measured as 'colour'.
        paths: HR images, or LQ images where there is no ground truth.
        data: what to call them.
        thresholds, ground_truth: as for :func:`calibrate`.

    Raises:
        UserError: an image that is not readable or too small.
    """
    device = next(net.parameters()).device
    masks = {('colour', None): net.pure_pass}
    masks |= {(MASK, t): build_mask(MASK, threshold=t).to(device) for t in sorted(set(thresholds))}
    scopes = dict.fromkeys((net.scopes[:1], net.scopes))  # one, where there is one attention alone
    settings = [(scope, *key, mask) for scope in scopes for key, mask in masks.items()]
    losses, saved = ([[] for _ in settings] for _ in range(2))
    total = len(paths) * (1 + len(settings))
    with torch.inference_mode(), tqdm(total=total, desc='curve', unit='run', leave=False, disable=None) as progress:
        for path in paths:
            lq, gt = _read(path, net.upscale, ground_truth)
            x, sides = to_tensor(lq).to(device), lq.shape[:2]
            with net.exempting(None):
                dense = to_image(net(x))
            before = None if gt is None else _psnr(dense, gt, net.upscale, path)
            of_dense = sum(net.macs(*sides).values())
            progress.update()
            for i, (scope, _, _, mask) in enumerate(settings):
                with net.exempting(mask, scope):
                    sr, pure = net(x, return_mask=True)
                    saved[i].append(1 - sum(net.macs(*sides, pure).values()) / of_dense)
                sr = to_image(sr)
                if gt is None:
                    loss = _estimate(_psnr(sr, dense, net.upscale, path))
                else:
                    loss = before - _psnr(sr, gt, net.upscale, path)
                losses[i].append(round(loss, 5))
                progress.update()
    points = tuple(
        Point(tuple(scope), name, threshold, tuple(loss), round(mean(share), 5))
        for (scope, name, threshold, _), loss, share in zip(settings, losses, saved)
    )
    return Curve(data, AGAINST[0 if ground_truth else 1], points)


def load_with_stand_in(checkpoint: Checkpoint) -> tuple[MaskedNetwork, dict, bool]:
    """The network with all attentions in its scope, in eval mode, its configuration in files, and whether the file has
    a stand-in for window attention; else that of the network is random.

    Raises:
        UserError: a network without window attention to exempt from, or weights that do not fit.
    """
    where = f'{checkpoint.path}: its configuration'
    config = masked_variant(described(checkpoint), str(checkpoint.path))
    if checkpoint.config is None:  # guessed: without a word on Pure-Pass, the setting is the paper's
        config = {name: value for name, value in config.items() if not name.startswith('pp_')}
    scopes = registered(ARCH_REGISTRY, config['type']).scopes
    paper = config | {'pp_scope': [scopes[0]], 'pp_mask': 'colour', 'pp_threshold': None}
    if scopes[0] == 'window':
        paper['pp_window_compensation'] = 'value'
    with torch_defaults():
        # refuses what does not fit before memory is taken
        build_and_load(lambda: build_network(paper, where), checkpoint, config['type'])
        every = paper | {'pp_scope': list(scopes), 'pp_window_compensation': 'linear'}
        net = build_network(every, where)
    own = {name: value for name, value in net.state_dict().items() if '.comp.' in name}
    has_stand_in = own.keys() <= checkpoint.state_dict.keys()
    load_into(net, replace(checkpoint, state_dict=own | checkpoint.state_dict))
    return net, config, has_stand_in


def _find(folder: Path, scale: int | None) -> list[tuple[str, Path]]:
    """(data set, file) of every image."""
    found = find_sources([folder], []) if scale is None else find_images(folder, scale)
    sources = [(name, source.path) for name, images in found.items() for source in images]
    if len(sources) < FEWEST:
        raise UserError(f'{folder}: holds {len(sources)} images, and a curve takes {FEWEST} or more; add some.')
    return sources


def evenly(items: Sequence, most: int) -> list:
    """At most so many of them, evenly from the first to the last."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _read(path: Path, scale: int, ground_truth: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """LQ and GT image, uint8 RGB, or their middle."""
    lq, gt = read_pair(path, scale) if ground_truth else (decode_rgb(path), None)
    height, width = (min(side, LARGEST) for side in lq.shape[:2])
    top, left = (lq.shape[0] - height) // 2, (lq.shape[1] - width) // 2
    if gt is not None:
        gt = gt[scale * top : scale * (top + height), scale * left : scale * (left + width)]
    return lq[top : top + height, left : left + width], gt


def _crops(sources: list[tuple[str, Path]], net: MaskedNetwork, ground_truth: bool) -> Tensor:
    """(CROPS, 3, side, side) LQ crops, the same each time, of at most SIDE pixels a side and of whole windows."""
    images = [_read(path, net.upscale, ground_truth)[0] for _, path in evenly(sources, CROPS)]
    side = min(SIDE, *(min(image.shape[:2]) for image in images)) // net.multiple * net.multiple
    if not side:
        raise UserError(
            f'{sources[0][1].parent}: its smallest image has less than {net.multiple}×{net.multiple} input pixels, '
            'which a stand-in is fitted to; leave it out.'
        )
    rng = np.random.default_rng(0)
    crops = []
    for i in range(CROPS):
        image = images[i % len(images)]
        top, left = (int(rng.integers(length - side + 1)) for length in image.shape[:2])
        crops.append(to_tensor(image[top : top + side, left : left + side]))
    return torch.cat(crops)


def _psnr(image: np.ndarray, other: np.ndarray, scale: int, path: Path) -> float:
    value = psnr(image, other, scale)
    if value is None:
        raise UserError(f'{path}: is too small to be measured; leave it out.')
    return min(value, BEST)


def _estimate(change: float) -> float:
    """Loss in dB from the PSNR of a result against the dense one, if that had USUAL dB against the ground truth and
    the change were independent of its error."""
    return 10 * math.log10(1 + 10 ** ((USUAL - change) / 10))
