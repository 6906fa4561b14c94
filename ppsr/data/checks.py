"""Checks of the data sets in an options file, made before anything is built or trained."""

import os
from collections.abc import Mapping

from basicsr.data.data_util import paired_paths_from_meta_info_file

from ppsr.data.lmdb_store import open_lmdb, read_meta_info
from ppsr.data.paired_sr_dataset import PairedSRDataset
from ppsr.data.pairs import FolderPairs, LmdbPairs, check_pair_sizes, open_pairs, option
from ppsr.errors import DataError
from ppsr.images import image_size, list_images

__all__ = ['check_datasets']

# what basicsr's metrics have to see of an image, pixels a side: one pixel, SSIM's window, NIQE's block
_SMALLEST = {'calculate_psnr': 1, 'calculate_ssim': 11, 'calculate_niqe': 96}


def check_datasets(opt: Mapping) -> None:
    """Check every data set of a BasicSR options dict: folders, pairing, sizes (headers only), LMDBs, meta files; and
    that validation can score every image and keep the sets apart.

    ``PairedSRDataset`` and basicsr's ``PairedImageDataset`` and ``SingleImageDataset`` are known; other types are left
    alone. A data set's own ``scale`` and ``phase`` count where the option parser has set them, else those of ``opt``
    and of its key (``train``, ``val``, ``val_2``, ``test_1``).

    Raises:
        DataError: the first thing that is wrong, in one sentence.
    """
    datasets = opt.get('datasets')
    if not isinstance(datasets, Mapping) or not datasets:
        raise DataError("The options name no data sets (key 'datasets').")
    names: dict[str, str] = {}
    for key, dataset in datasets.items():
        if not isinstance(dataset, Mapping):
            raise DataError(f'datasets.{key} must be a block of options, but is {dataset!r}.')
        phase = key.split('_')[0]
        if phase not in ('train', 'val', 'test'):
            raise DataError(f"datasets.{key}: the name must begin with 'train', 'val' or 'test'.")
        dataset = {'name': key, 'phase': phase, 'scale': opt.get('scale'), **dataset}
        if phase != 'train':  # pictures and best results are kept under the name
            other = names.setdefault(str(dataset['name']).casefold(), key)
            if other != key:
                raise DataError(
                    f'datasets.{other} and datasets.{key} are both called {dataset["name"]!r}, and would overwrite '
                    "each other's pictures and records: give them names of their own (name: …)."
                )
        check = _CHECKS.get(option(dataset, 'type'))
        if check is not None:
            pairs = check(dataset)
            if phase != 'train' and pairs is not None:
                _check_metrics(pairs, dataset['scale'], (opt.get('val') or {}).get('metrics') or {})


def _check_metrics(pairs: FolderPairs | LmdbPairs, scale: int, metrics: Mapping) -> None:
    """Refuse an image of which a metric sees too little once its border is cropped: its value would be NaN."""
    needs = {}  # by name: pixels a side
    for name, metric in metrics.items():
        border = metric.get('crop_border', 0)
        if metric.get('type') in _SMALLEST and isinstance(border, int):
            needs[name] = _SMALLEST[metric['type']] + 2 * border
    if not needs:
        return
    name = max(needs, key=needs.get)
    for index in range(len(pairs)):
        (height, width), _ = pairs.sizes(index)
        if min(height, width) * scale < needs[name]:
            raise DataError(
                f'{pairs.paths(index)[1]} ({height * scale}x{width * scale}) is too small for val → metrics → {name}, '
                f'which needs {needs[name]} pixels a side with its crop_border: leave the image out (meta_info_file), '
                'or lower crop_border.'
            )


def _paired_sr_dataset(dataset: Mapping) -> FolderPairs | LmdbPairs:
    return PairedSRDataset(dataset).pairs  # making one is the check


def _check_paired_image_dataset(dataset: Mapping) -> FolderPairs | LmdbPairs:
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
    if dataset.get('meta_info_file') is not None and isinstance(pairs, FolderPairs):
        _check_basicsr_finds(pairs, dataset)
    return pairs


def _check_basicsr_finds(pairs: FolderPairs, dataset: Mapping) -> None:
    """basicsr's class takes the first word of a line, and looks for LQ images in their folder itself."""
    folders = [pairs.lq_folder, pairs.gt_folder]
    meta_info_file = option(dataset, 'meta_info_file')
    found = paired_paths_from_meta_info_file(
        folders, ['lq', 'gt'], meta_info_file, dataset.get('filename_tmpl') or '{}'
    )
    for path in (path for pair in found for path in pair.values()):
        if not os.path.isfile(path):
            raise DataError(
                f"meta_info_file {meta_info_file}: basicsr's PairedImageDataset would look for {path}, which is not "
                'there: write a name, one blank and the shape on each line, or set type: PairedSRDataset.'
            )


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
    'PairedSRDataset': _paired_sr_dataset,
    'PairedImageDataset': _check_paired_image_dataset,
    'SingleImageDataset': _check_single_image_dataset,
}
