"""A controlled comparison at small scale: reduced networks trained on equal terms, several seeds, one table.

For each seed every network sees the same patches in the same order, for the same number of steps, with the same
optimizer; networks with the same parameters also start from the same values. Quality is that of the averaged (EMA)
weights. A run that is complete is not repeated; an interrupted study goes on with the run that it was in.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import numpy as np
import torch
from basicsr.models import build_model
from basicsr.utils import set_random_seed
from tqdm import tqdm

from ppsr.archs.build import build_masked
from ppsr.atomic import atomic_path
from ppsr.data.benchmark import find_images, read_pair
from ppsr.data.bicubic import imresize_bicubic
from ppsr.errors import UserError
from ppsr.images import to_tensor
from ppsr.paper.complexity import count_parameters
from ppsr.paper.measure import Cache, evaluate, file_hash, quality
from ppsr.paper.report import Table
from ppsr.schema import (
    Choice,
    Each,
    Either,
    FileName,
    FilePath,
    Nested,
    Section,
    Several,
    Whole,
    check,
    show,
)
from ppsr.training import schema
from ppsr.training.options import read_yaml
from ppsr.weights import load_model, save_checkpoint

__all__ = ['load_study', 'patches', 'run', 'study_table']

BICUBIC = 'bicubic'  # a row of every table
TIMED_PASSES = 3  # of every network over a test set; the fastest counts

Pair = tuple[np.ndarray, np.ndarray]


class Data(Section):
    """data of a study"""

    train: Annotated[list, Several(FilePath()), 'folders of training images']
    test: Annotated[list, Several(FilePath()), 'folders of test images']
    lq_size: Annotated[int, Whole(1, 4096), 'side of an LQ patch']
    batch_size: Annotated[int, Whole(1, 65536), 'patches in a batch']


class Study(Section):
    """Top level of a study"""

    name: Annotated[str, FileName(), 'of the study']
    scale: Annotated[int, Whole(1, 16), 'enlargement']
    num_gpu: Annotated[int | str, Either(Whole(0, 1024), Choice('auto')), '0: CPU; one is used at most'] = 'auto'
    seeds: Annotated[list, Several(Whole(0, schema.MAX_SEED)), 'a run of every network for each']
    common: Annotated[dict, schema.Mapped(), "arguments of all networks; a network's own win"] = {}
    networks: Annotated[dict, Each(schema.Mapped(), least=1), 'label: type and arguments; the first is compared with']
    data: Annotated[dict, Nested(Data), 'what is trained and tested on']
    train: Annotated[dict, Nested(schema.Train), 'as in every options file']

    @classmethod
    def together(cls, values, where):
        if len(set(values['seeds'])) != len(values['seeds']):
            raise UserError(f'{where} seeds must differ, not {show(values["seeds"])}.')
        for label in values['networks']:
            place = f'{where} networks → {show(label)}'
            FileName()(label, place)
            if label == BICUBIC:
                raise UserError(f'{place} is the name of another row of the table; give it another.')
        if (values['train']['teacher'] or {}).get('cache'):
            raise UserError(f'{where} train → teacher → cache: a study keeps no answers; leave it out.')


def load_study(path: str | Path) -> dict:
    """The options of a study, checked; ``train`` is as it was written, so that a new option repeats no run.

    Raises:
        UserError: anything wrong that can be seen without opening an image: a key that is missing, unknown or out of
            its range, or a network that cannot be built.
    """
    given = read_yaml(path)
    where = f'study {path}:'
    opt = check(Study, given, where)
    opt['train'] = given['train']
    for label, own in opt['networks'].items():
        place = f'{where} networks → {label}'
        if own.get('upscale', opt['scale']) != opt['scale']:
            raise UserError(f'{place} → upscale is {show(own["upscale"])} but the scale of the study {opt["scale"]}.')
        opt['networks'][label] = opt['common'] | own | {'upscale': opt['scale']}
        build_masked(opt['networks'][label], place)
    return opt


def _read(folders: list[str], scale: int) -> dict[str, list[Pair]]:
    """Data sets by name, as (LQ, GT) pairs."""
    found = {}
    for folder in folders:
        for name, sources in find_images(folder, scale).items():
            found[name] = [read_pair(s.path, scale) for s in tqdm(sources, desc=name, leave=False, disable=None)]
    return found


def patches(pairs: list[Pair], scale: int, lq_size: int, batch_size: int, seed: int) -> Iterator[dict]:
    """Endless training batches {'lq', 'gt'} that depend on the seed only: random image, place, flips and transpose.

    Raises:
        UserError: no image is as large as a patch.
    """
    large = [(lq, gt) for lq, gt in pairs if min(lq.shape[:2]) >= lq_size]
    if not large:
        raise UserError(f'no training image holds an LQ patch of {lq_size}×{lq_size} pixels.')
    random = np.random.default_rng(seed)

    def one() -> Pair:
        lq, gt = large[random.integers(len(large))]
        y, x = (int(random.integers(side - lq_size + 1)) for side in lq.shape[:2])
        flip_y, flip_x, transpose = random.integers(2, size=3)
        cut = []
        for image, factor in ((lq, 1), (gt, scale)):
            part = image[y * factor : (y + lq_size) * factor, x * factor : (x + lq_size) * factor]
            part = part[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
            cut.append(part.swapaxes(0, 1) if transpose else part)
        return cut[0], cut[1]

    while True:
        chosen = [one() for _ in range(batch_size)]
        lq, gt = (torch.cat([to_tensor(image) for image in images]) for images in zip(*chosen))
        yield {'lq': lq, 'gt': gt}


def _train(opt: dict, label: str, seed: int, pairs: list[Pair], folder: Path) -> tuple[torch.nn.Module, float]:
    """The EMA network of one run in eval mode, and the seconds that its training took; losses that were not finite are
    noted in `folder`."""
    train = check(schema.Train, opt['train'], 'train')
    set_random_seed(seed)
    gpus = torch.cuda.device_count() if opt['num_gpu'] == 'auto' else opt['num_gpu']
    model = build_model(
        {
            'name': opt['name'],
            'model_type': 'PurePassSRModel',
            'scale': opt['scale'],
            'num_gpu': min(gpus, 1),
            'manual_seed': seed,
            'is_train': True,
            'dist': False,
            'rank': 0,
            'world_size': 1,
            'network_g': dict(opt['networks'][label]),
            'path': {'log': str(folder)},
            'train': train,  # basicsr takes entries out of a copy
            'val': None,
            'logger': {},
        }
    )
    steps, warmup = train['total_iter'], train['warmup_iter']
    batches = patches(pairs, opt['scale'], opt['data']['lq_size'], opt['data']['batch_size'], seed)
    start = time.perf_counter()
    with tqdm(range(1, steps + 1), desc=f'{label}, seed {seed}', leave=False, disable=None) as progress:
        for step in progress:
            model.update_learning_rate(step, warmup_iter=warmup)
            model.feed_data(next(batches))
            model.optimize_parameters(step)
            if step % 50 == 0:
                progress.set_postfix({name: f'{value:.4f}' for name, value in model.get_current_log().items()})
    return model.get_bare_model(getattr(model, 'net_g_ema', model.net_g)).eval(), time.perf_counter() - start


def _seconds(opt: dict, images: list[Pair], folder: Path) -> dict[str, float]:
    """Seconds per image of every network on a test set. They take turns, so that another load on the machine meets all
    of them, and the fastest pass of each counts."""
    device = 'cuda' if opt['num_gpu'] != 0 and torch.cuda.is_available() else 'cpu'
    inputs = [to_tensor(lq).to(device) for lq, _ in images]
    files = {label: folder / f'{label}_{opt["seeds"][0]}.safetensors' for label in opt['networks']}
    networks = {label: load_model(file, device=device) for label, file in files.items()}
    passes: dict[str, list[float]] = {label: [] for label in networks}
    with torch.inference_mode():
        for _ in range(TIMED_PASSES):
            for label, net in networks.items():
                start = time.perf_counter()
                for x in inputs:
                    net(x)
                if device == 'cuda':
                    torch.cuda.synchronize()
                passes[label].append(time.perf_counter() - start)
    return {label: min(taken) / len(images) for label, taken in passes.items()}


def _run_one(opt: dict, label: str, seed: int, train: list[Pair], test: dict[str, list[Pair]], folder: Path) -> dict:
    net, seconds = _train(opt, label, seed, train, folder)
    save_checkpoint(folder / f'{label}_{seed}.safetensors', net.state_dict(), opt['networks'][label])
    results = {'parameters': count_parameters(net), 'train_seconds': seconds, 'test': {}}
    for name, images in test.items():
        records = [evaluate(net, lq, gt) for lq, gt in images]
        results['test'][name] = {key: mean(record[key] for record in records) for key in records[0]}
    return results


def run(opt: dict, folder: str | Path) -> dict[tuple[str, int], dict]:
    """All runs of a study that are not in `folder` yet; weights and results are kept there.

    Returns:
        (label, seed) -> 'parameters', 'train_seconds', and 'test': data set -> means of psnr, ssim, pure, macs, …, and
        'seconds' per image, which is told once for all seeds; ('bicubic', 0) has psnr and ssim alone.

    Raises:
        UserError: no images, or a folder that cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'{folder}: the folder cannot be made ({e.strerror or e}).') from e
    scale, data = opt['scale'], opt['data']
    files = {
        part: [file_hash(s.path) for path in data[part] for found in find_images(path, scale).values() for s in found]
        for part in ('train', 'test')
    }
    cache, found = Cache(folder / 'runs.jsonl'), {}
    train: list[Pair] = []
    test = _read(data['test'], scale)
    for seed in opt['seeds']:
        for label, network in opt['networks'].items():
            key = Cache.key(network=network, seed=seed, files=files, data=data, train=opt['train'], scale=scale)
            result = cache.get(key)
            if result is None:
                train = train or [pair for pairs in _read(data['train'], scale).values() for pair in pairs]
                result = _run_one(opt, label, seed, train, test, folder)
                cache.put(key, result)
            found[label, seed] = result
    for name, images in test.items():
        key = Cache.key(seconds=name, networks=opt['networks'], files=files['test'], passes=TIMED_PASSES)
        seconds = cache.get(key)
        if seconds is None:
            seconds = _seconds(opt, images, folder)
            cache.put(key, seconds)
        for label, seed in found:
            found[label, seed]['test'][name]['seconds'] = seconds[label]
    bicubic = {
        name: [quality(imresize_bicubic(lq, scale, up=True), gt, scale) for lq, gt in images]
        for name, images in test.items()
    }
    found[BICUBIC, 0] = {
        'test': {name: {key: mean(r[key] for r in rs) for key in ('psnr', 'ssim')} for name, rs in bicubic.items()}
    }
    return found


def _with_deviation(values: list[float], form: str) -> str:
    return format(mean(values), form) + (f' ± {stdev(values):.3f}' if len(values) > 1 else '')


def study_table(opt: dict, found: dict[tuple[str, int], dict]) -> Table:
    """Mean ± standard deviation over the seeds, by data set and network; differences are from the first network, seed
    by seed."""
    rows = []
    first = next(iter(opt['networks']))
    for name, bicubic in found[BICUBIC, 0]['test'].items():
        rows.append([name, BICUBIC, None, None, None, None, f'{bicubic["psnr"]:.3f}', None])
        for label in opt['networks']:
            runs = [found[label, seed] for seed in opt['seeds']]
            tests = [one['test'][name] for one in runs]
            psnr = [test['psnr'] for test in tests]
            against = [test - found[first, seed]['test'][name]['psnr'] for test, seed in zip(psnr, opt['seeds'])]
            rows.append(
                [name, label, runs[0]['parameters'], 100 * mean(t['pure'] for t in tests)]
                + [mean(t['macs'] for t in tests) / 1e9, tests[0]['seconds'], _with_deviation(psnr, '.3f')]
                + [None if label == first else _with_deviation(against, '+.3f')]
            )
    train, data = opt['train'], opt['data']
    return Table(
        ['data set', 'network', 'parameters', 'pure (%)', 'GMACs per image', 'seconds per image']
        + ['PSNR (dB)', f'from {first} (dB)'],
        rows,
        ['', '', ',', '.1f', '.3f', '.3f', '', ''],
        f'×{opt["scale"]}: {train["total_iter"]} steps of {data["batch_size"]} patches of '
        f'{data["lq_size"]}×{data["lq_size"]} LQ pixels; mean ± standard deviation over {len(opt["seeds"])} seeds',
    )


def write(folder: str | Path, table: Table) -> None:
    """study.md, study.csv and study.tex in `folder`.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for suffix, text in (('md', table.markdown()), ('csv', table.csv()), ('tex', table.latex('tab:study'))):
            with atomic_path(Path(folder) / f'study.{suffix}') as temporary:
                temporary.write_text(text, encoding='utf-8')
    except OSError as e:
        raise UserError(f'{folder}: the study cannot be written ({e.strerror or e}).') from e
