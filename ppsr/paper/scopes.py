"""Masks and scopes beside each other: what each exempts, loses and saves, in multiply-adds and in seconds, on the same
weights. The controls exempt as many pixels of each image as the paper's mask, but others."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from time import process_time

import torch
from tqdm import tqdm

from ppsr.archs.masked import MaskedNetwork
from ppsr.calibration.measure import evenly, load_with_stand_in
from ppsr.data.benchmark import read_pair
from ppsr.data.layout import Source
from ppsr.errors import UserError
from ppsr.images import to_image, to_tensor
from ppsr.masks import PixelMask, build_mask
from ppsr.metrics import psnr
from ppsr.paper.measure import Cache, file_hash
from ppsr.paper.report import Table
from ppsr.runtime import threads
from ppsr.weights import read_checkpoint, resolve

__all__ = ['DENSE', 'MASKS', 'SETS', 'files_with_stand_in', 'measure_scopes', 'scope_table']

MEANING = 2  # of a record; raise it when a record comes to mean something else
SETS = ('Set5', 'Set14', 'BSD100')
MOST = 25  # images of a data set, evenly: all masks, both scopes, in minutes on two cores
DENSE = 'dense'
# label -> family, which has a colour in the plot, and how the mask is built; None: the network's own
MASKS = {
    'colour (the paper)': ('colour (the paper)', None),
    'dynamic': ('dynamic', {'type': 'dynamic'}),
    'gradient, g < 0.03': ('gradient', {'type': 'gradient', 'threshold': 0.03}),
    'gradient, g < 0.05': ('gradient', {'type': 'gradient', 'threshold': 0.05}),
    'gradient, g < 0.07': ('gradient', {'type': 'gradient', 'threshold': 0.07}),
    'gradient, g < 0.09': ('gradient', {'type': 'gradient', 'threshold': 0.09}),
    'variance, σ < 0.05': ('variance', {'type': 'variance', 'threshold': 0.05}),
    'variance, σ < 0.07': ('variance', {'type': 'variance', 'threshold': 0.07}),
    'variance, σ < 0.10': ('variance', {'type': 'variance', 'threshold': 0.1}),
    'variance, σ < 0.13': ('variance', {'type': 'variance', 'threshold': 0.13}),
    'colour and σ < 0.10': ('colour and variance', {'type': 'both', 'threshold': 0.1}),
    'lowest gradient, as many as colour': ('lowest gradient', {'type': 'same_share', 'score': 'gradient'}),
    'lowest variance, as many as colour': ('lowest variance', {'type': 'same_share', 'score': 'variance'}),
    'random, as many as colour': ('random', {'type': 'same_share', 'score': 'random'}),
}

# weights -> data set -> setting (scope and label of the mask joined, or DENSE) -> a record for each image
Found = dict[str, dict[str, dict[str, list[dict]]]]


def files_with_stand_in(weights: Sequence[str | Path], scale: int) -> dict[str, Path]:
    """Those of the weight files that are for this scale and have a stand-in for window attention, by what to call them.

    Args:
        weights: names or files, as :func:`ppsr.paper.tables.methods_of` takes them.
    """
    found = {}
    for entry in map(str, weights):
        path = entry if '=' not in entry or Path(entry).is_file() else entry.partition('=')[2]
        checkpoint = read_checkpoint(resolve(path))
        if checkpoint.scale == scale and any('.comp.weight' in name for name in checkpoint.state_dict):
            how = 'closed form' if 'stand_in' in checkpoint.facts else 'trained'
            found[f'{checkpoint.path.stem} ({how})'] = checkpoint.path
    return found


def measure_scopes(
    weights: Mapping[str, Path], data_sets: Mapping[str, Sequence[Source]], scale: int, cache: Cache
) -> Found:
    """Every mask in both scopes, and dense, on at most `MOST` images of each data set; from the cache what it has.

    Returns:
        Records with 'psnr' (dB), 'macs', 'exempt' (share of the padded tokens) and 'seconds' (of the processor, for one
        run on one thread, the settings of an image one after another).
    """
    total = len(weights) * sum(min(MOST, len(sources)) for sources in data_sets.values())
    found: Found = {}
    with tqdm(total=total, desc=f'×{scale} masks and scopes', unit='image', leave=False, disable=None) as progress:
        for label, path in weights.items():
            net = None
            for name, sources in data_sets.items():
                settings = found.setdefault(label, {}).setdefault(name, {})
                for source in evenly(sources, MOST):
                    masks = {key: spec for key, (_, spec) in MASKS.items()}
                    hashes = {'weights': file_hash(path), 'image': file_hash(source.path)}
                    key = Cache.key(kind='scopes', meaning=MEANING, scale=scale, masks=masks, **hashes)
                    record = cache.get(key)
                    if record is None:
                        net = net or load_with_stand_in(read_checkpoint(path))[0]
                        record = _measure(net, source.path)
                        cache.put(key, record)
                    for setting, one in record.items():
                        settings.setdefault(setting, []).append(one)
                    progress.update()
    return found


def settings(net: MaskedNetwork) -> dict[str, tuple[PixelMask | None, Sequence[str] | None]]:
    """Mask and scope of every setting by its name; `net` has the paper's mask and a stand-in."""
    made: dict = {DENSE: (None, None)}
    for label, (_, spec) in MASKS.items():
        mask = net.pure_pass if spec is None else build_mask(spec)
        made |= {f'{scope}: {label}': (mask, scope.split(' + ')) for scope in _scopes(net.scopes)}
    return made


def _scopes(scopes: Sequence[str]) -> list[str]:
    return [scopes[0], ' + '.join(scopes)]


@torch.inference_mode()
def _measure(net: MaskedNetwork, path: Path) -> dict[str, dict]:
    lq, gt = read_pair(path, net.upscale)
    x, sides = to_tensor(lq), lq.shape[:2]
    record = {}
    runs = list(settings(net).items())
    middle = len(runs) // 2  # dense at both ends and there: everything is compared with its time
    for setting, (mask, scope) in [*runs[:middle], runs[0], *runs[middle:], runs[0]]:
        with net.exempting(mask, scope), threads(1):
            if not record:
                net(x)  # warms up
            start = process_time()
            sr, pure = net(x, return_mask=True)
            seconds = process_time() - start
            macs = sum(net.macs(*sides, pure).values())
        value = psnr(to_image(sr), gt, net.upscale)
        if value is None:
            raise UserError(f'{path}: is too small to be measured; leave it out.')
        exempt = 0.0 if pure is None else pure.double().mean().item()
        times = [*record.get(setting, {}).get('times', []), seconds]
        record[setting] = {'psnr': value, 'macs': macs, 'exempt': exempt, 'seconds': mean(times), 'times': times}
    return record


def from_dense(records: Sequence[dict], dense: Sequence[dict]) -> tuple[float, float | None]:
    """Mean difference in PSNR over the images, in mdB, and its standard error."""
    differences = [1000 * (one['psnr'] - other['psnr']) for one, other in zip(records, dense)]
    return mean(differences), stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None


def percent_less(records: Sequence[dict], dense: Sequence[dict], what: str) -> float:
    """What is saved of the sum over the images, in percent of the dense network's."""
    return 100 * (1 - sum(one[what] for one in records) / sum(one[what] for one in dense))


def scope_table(found: Found, scale: int) -> Table:
    """One row per data set, weights and setting."""
    rows = []
    for name in dict.fromkeys(name for sets in found.values() for name in sets):
        for label, sets in found.items():
            dense = sets[name][DENSE]
            for setting, records in sets[name].items():
                scope, _, mask = setting.partition(': ')
                row = [name, label, mask or DENSE, scope if mask else 'nothing']
                row += [100 * mean(one['exempt'] for one in records)] if mask else [None]
                row += [percent_less(records, dense, what) if mask else None for what in ('macs', 'seconds')]
                rows.append(
                    [
                        *row,
                        mean(one['psnr'] for one in records),
                        *(from_dense(records, dense) if mask else (None, None)),
                    ]
                )
    counts = {name: len(of[DENSE]) for sets in found.values() for name, of in sets.items()}
    return Table(
        ['data set', 'weights', 'mask', 'exempt from', 'exempt (%)', 'saved (%)', 'time saved (%)', 'PSNR (dB)']
        + ['from dense (mdB)', 'std. error (mdB)'],
        rows,
        ['', '', '', '', '.1f', '.1f', '.1f', '.3f', '+.1f', '.1f'],
        f'×{scale}: masks, and the attentions that pure pixels are exempt from',
        [
            f'Images: {", ".join(f"{count} of {name}" for name, count in counts.items())}, evenly. saved: of the '
            'multiply-adds of the dense network, together over the images; time saved: the same of the seconds of a '
            'processor core, one run on one thread. from dense: mean over the images of the difference in PSNR, in '
            'thousandths of a dB, with its standard error.'
        ],
    )
