"""``ppsr prepare --check``: is a prepared data set whole, and are its LR images the exact ones?"""

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from ppsr.data.bicubic import imresize_bicubic, modcrop
from ppsr.data.layout import DataSetFolders
from ppsr.data.lmdb_store import read_meta_info
from ppsr.data.pairs import FolderPairs, LmdbPairs, check_pair_sizes
from ppsr.data.prepare import GRID_FILE, Grid, in_parallel, read_grid, sub_image_boxes, sub_names
from ppsr.errors import DataError, UserError
from ppsr.images import decode_rgb, image_size, list_images

__all__ = ['CheckReport', 'verify_dataset']


@dataclass
class CheckReport:
    """How many pairs were read, and a sentence for each thing that is wrong."""

    pairs: int = 0
    problems: list[str] = field(default_factory=list)


def verify_dataset(folders: DataSetFolders, scales: list[int] | None = None, jobs: int = 1) -> CheckReport:
    """Decode every image of a prepared data set, and compare the LR images with exact ones made anew.

    Folders that pair are read in full: HR with each LR scale, sub-images and LMDBs where there are any.

    Args:
        folders: the data set.
        scales: the scales that must be there; None for those that are.
        jobs: number of processes.

    Raises:
        DataError: the data set is not there at all.
    """
    if not folders.hr.is_dir():
        raise DataError(f'There is no data set at {folders.root} (no folder HR in it).')
    report = CheckReport()
    wanted = scales or folders.scales()
    if not wanted:
        report.problems.append(f'{folders.root} has no LR folder (LRbicx2, LRbicx3, LRbicx4).')
    for scale in wanted:
        _verify_pairs(folders.hr, folders.lr(scale), scale, True, jobs, report)
        if folders.hr_sub(scale).exists() or folders.lr_sub(scale).exists():
            _verify_pairs(folders.hr_sub(scale), folders.lr_sub(scale), scale, False, jobs, report)
        if folders.hr_sub(scale).exists() or folders.lr_sub(scale).exists():
            _verify_cuts(folders, scale, jobs, report)
        for gt, lq in ((folders.hr, folders.lr(scale)), (folders.hr_sub(scale), folders.lr_sub(scale))):
            gt, lq = (path.with_name(f'{path.name}.lmdb') for path in (gt, lq))
            if lq.exists():
                _verify_pairs(gt, lq, scale, False, jobs, report)
    _verify_meta_info(folders.hr, folders.meta_info, report)
    for scale in wanted:
        _verify_meta_info(folders.hr_sub(scale), folders.meta_info_sub(scale), report)
    return report


def _verify_meta_info(folder: Path, path: Path, report: CheckReport) -> None:
    """What a meta-info file says must be true; it may name a part of the images."""
    if not path.exists():
        return
    try:
        sizes, there = read_meta_info(path), set(list_images(folder))
        for key, size in sizes.items():
            name = f'{key}.png'
            if name not in there:
                report.problems.append(f'{path} names {name}, which {folder} lacks.')
            elif image_size(folder / name) != size:
                report.problems.append(f'{path} says another size of {name} than the image has.')
    except DataError as error:
        report.problems.append(str(error))


def _verify_cuts(folders: DataSetFolders, scale: int, jobs: int, report: CheckReport) -> None:
    """The sub-images are those of the images: none missing, none left over, the same pixels."""
    try:
        grid, names = read_grid(folders.hr_sub(scale) / GRID_FILE), list_images(folders.hr)
        if grid is None:
            return
        work = partial(_verify_cuts_of, folders, scale, grid)
        expected = set()
        for cuts, problems in in_parallel(work, names, jobs, f'{folders.root.name}: sub-images x{scale}'):
            expected.update(cuts)
            report.problems += problems
        for folder in (folders.hr_sub(scale), folders.lr_sub(scale)):
            surplus = sorted(set(list_images(folder)) - expected)
            report.problems += [f'{folder / name} is left over: no image of {folders.hr} has it.' for name in surplus]
    except UserError as error:
        report.problems.append(str(error))


def _verify_cuts_of(folders: DataSetFolders, scale: int, grid: Grid, name: str) -> tuple[list[str], list[str]]:
    """Names of the sub-images that an image has, and what is wrong with them."""
    problems, cuts = [], []
    try:
        height, width = image_size(folders.hr / name)
        boxes = sub_image_boxes(height // scale, width // scale, scale, grid)
        cuts = sub_names(os.path.splitext(name)[0], len(boxes))
        gt, lq = decode_rgb(folders.hr / name), decode_rgb(folders.lr(scale) / name)
    except DataError:
        return cuts, []  # said of the images themselves
    for cut, box in zip(cuts, boxes):
        for folder, image, factor in ((folders.hr_sub(scale), gt, scale), (folders.lr_sub(scale), lq, 1)):
            top, left, h, w = (factor * value for value in box)
            try:
                found = decode_rgb(folder / cut)
            except DataError as error:
                problems.append(str(error))
                continue
            wanted = image[top : top + h, left : left + w]
            if found.shape == wanted.shape and (found != wanted).any():  # another size is said of the pair
                problems.append(f'{folder / cut} is not the part of {name} that it should be.')
    return cuts, problems


def _verify_pairs(gt: Path, lq: Path, scale: int, compare: bool, jobs: int, report: CheckReport) -> None:
    """Check one pair of folders or LMDBs and add to the report."""
    try:
        if lq.suffix == '.lmdb':
            pairs = LmdbPairs(str(lq), str(gt))
            check_pair_sizes(pairs, scale)
        else:
            pairs = FolderPairs(str(lq), str(gt))
    except DataError as error:
        report.problems.append(str(error))
        if lq.suffix == '.lmdb' or not (gt.is_dir() and lq.is_dir()):
            return
        pairs = _SameNames(lq, gt)  # look at the images all the same
    work = partial(_verify_pair, pairs, scale, compare)
    found = in_parallel(work, range(len(pairs)), jobs, f'{gt.parent.name}: {lq.name}')
    report.problems += sorted({problem for problems in found for problem in problems})
    report.pairs += len(pairs)


class _SameNames:
    """The files of two folders that do not pair as a whole: each name that is in either of them."""

    def __init__(self, lq: Path, gt: Path):
        self._folders = lq, gt
        self._names = sorted(set(list_images(lq)) | set(list_images(gt)))

    def __len__(self) -> int:
        return len(self._names)

    def paths(self, index: int) -> tuple[str, str]:
        lq, gt = (str(folder / self._names[index]) for folder in self._folders)
        return lq, gt

    def read(self, index: int) -> tuple[bytes | None, bytes | None]:
        lq, gt = (Path(path).read_bytes() if os.path.exists(path) else None for path in self.paths(index))
        return lq, gt


def _verify_pair(pairs, scale: int, compare: bool, index: int) -> list[str]:
    problems, images = [], []
    try:
        contents = pairs.read(index)
    except DataError as error:
        return [str(error)]
    for content, path in zip(contents, pairs.paths(index)):
        if content is None:
            continue  # it is missing, which has been said
        store, name = os.path.split(path)
        if store.endswith('.lmdb') and os.path.isdir(file := store.removesuffix('.lmdb')):
            file = Path(file, name)
            if not file.is_file() or file.read_bytes() != content:
                problems.append(f'{path} in the LMDB is not the image {file}.')
        try:
            images.append(decode_rgb(content, path))
        except DataError as error:
            problems.append(str(error))
    if len(images) < 2:
        return problems
    lq, gt = images
    lq_path, gt_path = pairs.paths(index)
    expected = tuple(side // scale for side in gt.shape[:2])
    if lq.shape[:2] != expected:
        size = f'{lq.shape[0]}x{lq.shape[1]}, not {expected[0]}x{expected[1]}'
        problems.append(f'{lq_path} does not fit {gt_path} at scale {scale}: it is {size}.')
    elif compare:
        off = np.abs(imresize_bicubic(modcrop(gt, scale), scale).astype(np.int16) - lq)
        if off.any():
            problems.append(
                f'{lq_path} is not the exact bicubic of {gt_path}: {100 * (off > 0).mean():.2f} % of its samples '
                f'differ, by up to {off.max()}.'
            )
    return problems
