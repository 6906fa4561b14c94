"""Checks of the data sets in an options file, made before anything is built or trained."""

import os
from collections.abc import Mapping

from ppsr.data.lmdb_store import open_lmdb, read_meta_info
from ppsr.data.paired_sr_dataset import PairedSRDataset
from ppsr.data.pairs import check_pair_sizes, open_pairs, option
from ppsr.errors import DataError
from ppsr.images import image_size, list_images

__all__ = ['check_datasets']


def check_datasets(opt: Mapping) -> None:
    """Check every data set of a BasicSR options dict: folders, pairing, sizes (headers only), LMDBs, meta files.

    ``PairedSRDataset`` and basicsr's ``PairedImageDataset`` and ``SingleImageDataset`` are known; other types are left
    alone. A data set's own ``scale`` and ``phase`` count where the option parser has set them, else those of ``opt``
    and of its key (``train``, ``val``, ``val_2``, ``test_1``).

    Raises:
        DataError: the first thing that is wrong, in one sentence.
    """
    datasets = opt.get('datasets')
    if not isinstance(datasets, Mapping) or not datasets:
        raise DataError("The options name no data sets (key 'datasets').")
    for key, dataset in datasets.items():
        if not isinstance(dataset, Mapping):
            raise DataError(f'datasets.{key} must be a block of options, but is {dataset!r}.')
        phase = key.split('_')[0]
        if phase not in ('train', 'val', 'test'):
            raise DataError(f"datasets.{key}: the name must begin with 'train', 'val' or 'test'.")
        dataset = {'name': key, 'phase': phase, 'scale': opt.get('scale'), **dataset}
        check = _CHECKS.get(option(dataset, 'type'))
        if check is not None:
            check(dataset)


def _check_paired_image_dataset(dataset: Mapping) -> None:
    """What basicsr's own class needs beyond ours: equal suffixes, exact sizes in training, no default values."""
    for key in ('io_backend',) if dataset['phase'] != 'train' else ('io_backend', 'gt_size', 'use_hflip', 'use_rot'):
        if dataset.get(key) is None:
            raise DataError(f'The options of data set {dataset["name"]!r} lack the key {key!r}.')
    pairs = open_pairs(dataset)
    for index in range(len(pairs)):
        lq, gt = pairs.paths(index)
        if os.path.splitext(lq)[1] != os.path.splitext(gt)[1]:
            raise DataError(f'{lq} and {gt} have different suffixes: PairedImageDataset cannot pair them.')
    train = dataset['phase'] == 'train'
    gt_size = option(dataset, 'gt_size', int) if train else None
    check_pair_sizes(pairs, option(dataset, 'scale', int), gt_size, exact=train)


def _check_single_image_dataset(dataset: Mapping) -> None:
    folder = option(dataset, 'dataroot_lq')
    if (dataset.get('io_backend') or {}).get('type') == 'lmdb':
        read_meta_info(os.path.join(folder, 'meta_info.txt'))
        open_lmdb(folder)
        return
    names = list_images(folder)
    if not names:
        raise DataError(f'Folder {folder} holds no images.')
    image_size(os.path.join(folder, names[0]))
    meta_info_file = dataset.get('meta_info_file')
    if meta_info_file is not None and not os.path.isfile(os.path.expanduser(meta_info_file)):
        raise DataError(f'meta_info_file {meta_info_file} does not exist.')


_CHECKS = {
    'PairedSRDataset': PairedSRDataset,  # making one is the check
    'PairedImageDataset': _check_paired_image_dataset,
    'SingleImageDataset': _check_single_image_dataset,
}
