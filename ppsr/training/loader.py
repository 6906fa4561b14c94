"""Training batches that depend on the seed, the epoch and the position in it, and on nothing else.

Order and augmentation of sample number p of epoch e follow from (manual_seed, e, p). A training that is interrupted and
resumed in the middle of an epoch therefore sees the very samples that it would have seen, with any number of loader
workers; and n processes with batches of b see together what one process with batches of n·b sees.
"""

import contextlib
import math
import random
import signal
import threading
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from basicsr.data.prefetch_dataloader import CUDAPrefetcher
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ppsr.data.synthetic_graphics import graphics_batch, graphics_shape
from ppsr.errors import UserError

__all__ = ['TrainBatches']


class TrainBatches:
    """Batches of a training set, epoch by epoch, from any position.

    Args:
        dataset: gives dictionaries; draws from the global generators of Python, numpy and torch as it likes.
        dataset_opt: ``batch_size_per_gpu``, ``num_worker_per_gpu``, ``dataset_enlarge_ratio``, ``pin_memory`` and
            ``persistent_workers`` as in BasicSR. ``prefetch_mode`` 'cuda' copies a batch ahead to the GPU.
            ``synthetic_graphics`` is the share of batches that are made of drawings instead
            (:mod:`ppsr.data.synthetic_graphics`).
        opt: the options of the run: ``manual_seed``, ``num_gpu``, ``dist``, ``rank``, ``world_size``.

    Raises:
        UserError: fewer samples in an epoch than in a batch, or a ``prefetch_mode`` that does not work here.
    """

    def __init__(self, dataset: Dataset, dataset_opt: Mapping, opt: Mapping):
        workers, batch_size = dataset_opt['num_worker_per_gpu'], dataset_opt['batch_size_per_gpu']
        self.global_batch = batch_size * opt['world_size']
        self.name, self.opt, self.prefetch = dataset_opt['name'], opt, _prefetch_mode(dataset_opt, opt)
        self.dataset = dataset
        self.drawn = dataset_opt.get('synthetic_graphics') or 0.0
        self.gt_size = dataset_opt.get('gt_size')
        ratio = dataset_opt.get('dataset_enlarge_ratio') or 1
        self.sampler = EpochSampler(len(dataset), ratio, opt['manual_seed'], opt['rank'], opt['world_size'])
        if len(self.sampler) < batch_size:
            raise UserError(
                f'data set {dataset_opt["name"]}: an epoch has {len(self.sampler)} samples and a batch {batch_size}; '
                'lower batch_size_per_gpu or raise dataset_enlarge_ratio.'
            )
        self.loader = DataLoader(
            SeededSamples(dataset),
            batch_size,
            sampler=self.sampler,
            num_workers=workers,
            drop_last=True,
            collate_fn=_collate,
            worker_init_fn=_outlive_signals,
            pin_memory=bool(dataset_opt.get('pin_memory')),
            persistent_workers=bool(dataset_opt.get('persistent_workers')) and workers > 0,
            generator=torch.Generator(),  # its own: an epoch that starts must not move torch's global generator
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict]:
        """The batches of an epoch from number `start` on.

        Raises:
            UserError: the data set met a broken image, in whichever process that was, or a loader worker was killed.
        """
        self.sampler.epoch, self.sampler.start = epoch, start * self.loader.batch_size
        batches = self._with_drawings(_raising(self.loader, self.name), epoch, start)
        if not self.prefetch:
            yield from batches
            return

        prefetcher = CUDAPrefetcher(batches, self.opt)
        while (batch := prefetcher.next()) is not None:
            yield batch

    def _with_drawings(self, batches: Iterator[dict], epoch: int, start: int) -> Iterator[dict]:
        """The batches, some replaced; which ones and by what follows from the seed and the number in the epoch."""
        rank, world_size = self.opt['rank'], self.opt['world_size']
        for number, batch in enumerate(batches, start):
            rng = np.random.default_rng((self.opt['manual_seed'], epoch, number))
            if rng.random() < self.drawn:
                count, side = graphics_shape(rng, self.opt['scale'], self.gt_size, self.global_batch)
                seeds = [_seed(self.opt['manual_seed'], epoch, number, i) for i in range(count)]
                batch = graphics_batch(seeds[rank::world_size], self.opt['scale'], side)
            yield batch


class EpochSampler(Sampler):
    """(index, seed) of each sample of this process in the current epoch.

    Dealt out as basicsr's EnlargedSampler does, but for what does not go into the number of processes: it is left out
    instead of filled up, so that the order is the same for any number.

    Attributes:
        epoch: selects the permutation and the seeds.
        start: how many samples of this process to leave out at the beginning.
    """

    def __init__(self, length: int, ratio: float, seed: int, rank: int, world_size: int):
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.total = math.ceil(length * ratio)
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.total // self.world_size  # of a whole epoch: the loader's length must not depend on where it starts

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(_seed(self.seed, self.epoch))
        order = torch.randperm(self.total, generator=generator)
        for number in range(self.start, len(self)):
            position = number * self.world_size + self.rank
            yield int(order[position]) % self.length, _seed(self.seed, self.epoch, position)


class SeededSamples(Dataset):
    """A data set whose random choices are a function of the seed in the index."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> dict | UserError:
        index, seed = item
        with _seeded(seed):
            try:
                return self.dataset[index]
            except UserError as e:
                return e  # raised by epoch(): a worker would wrap it in the text of a traceback


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global CPU generators, and put them back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs, too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _collate(samples: list) -> dict | UserError:
    return next((sample for sample in samples if isinstance(sample, UserError)), None) or default_collate(samples)


def _raising(loader: DataLoader, name: str) -> Iterator[dict]:
    try:
        for batch in _quietly_started(loader):
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (RuntimeError, ConnectionError, EOFError) as e:
        # torch has seen a worker end without a word, or that in the middle of one: nearly always the system's, for want
        # of memory. What the data set itself raises in a worker begins with 'Caught'.
        in_the_middle = isinstance(e, (ConnectionError, EOFError)) and not str(e).startswith('Caught ')
        if not (loader.num_workers and in_the_middle) and not str(e).startswith('DataLoader worker'):
            raise
        reason = ' '.join(str(e).split())[:200].rstrip('.') or type(e).__name__
        raise UserError(
            f'data set {name}: a loader worker was killed ({reason}); memory or shared memory may be short: lower '
            'num_worker_per_gpu or batch_size_per_gpu.'
        ) from e


def _quietly_started(loader: DataLoader) -> Iterator:
    """Starts the workers. torch then raises the death of one in the middle of whatever the main thread does, half an
    optimizer step perhaps; without its handler it is found where the next batch is waited for."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, 'SIGCHLD'):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
    return batches


def _outlive_signals(worker_id: int) -> None:
    """Ctrl-C and cluster managers signal the whole process group: workers serve until the training itself stops."""
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):  # the last one is not on Windows
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _prefetch_mode(dataset_opt: Mapping, opt: Mapping) -> bool:
    mode, name = dataset_opt.get('prefetch_mode'), dataset_opt['name']
    if mode not in (None, 'cuda'):
        raise UserError(f'data set {name}: prefetch_mode {mode!r} is not one of ~ (the workers read ahead) and cuda.')
    if mode == 'cuda' and (opt['num_gpu'] == 0 or not dataset_opt.get('pin_memory')):
        raise UserError(f'data set {name}: prefetch_mode cuda needs a GPU and pin_memory: true.')
    return mode == 'cuda'
