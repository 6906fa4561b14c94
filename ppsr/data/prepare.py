"""From folders of HR images to what the option files name: exact LR, sub-images, meta-info files and LMDBs.

The layout is that of :mod:`ppsr.data.layout`. Every file appears under its name when it is whole, so an interrupted run
is resumed by starting it again: what is there, and has the right size, is skipped.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ppsr.atomic import atomic_path
from ppsr.data.bicubic import imresize_bicubic, modcrop
from ppsr.data.layout import DataSetFolders, Source
from ppsr.data.lmdb_store import build_lmdb, read_meta_info
from ppsr.errors import DataError, UserError
from ppsr.images import decode_rgb, describe_conversion, image_size, list_images, write_png

__all__ = ['Grid', 'Summary', 'in_parallel', 'prepare_dataset', 'sub_image_boxes']

_GRID_FILE = '.grid.json'


@dataclass(frozen=True)
class Grid:
    """How an image is cut into sub-images, in HR pixels: side, distance, and the rest that is worth one more."""

    crop_size: int = 480
    step: int = 240
    thresh_size: int = 0


@dataclass
class Summary:
    """What :func:`prepare_dataset` did with one data set."""

    made: int = 0
    skipped: int = 0
    converted: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class _Result:
    made: bool = False
    note: str | None = None
    error: str | None = None


def prepare_dataset(
    folders: DataSetFolders,
    sources: list[Source],
    scales: list[int],
    grid: Grid | None = None,
    lmdb: bool = False,
    meta_info: bool = False,
    jobs: int = 1,
    overwrite: bool = False,
) -> Summary:
    """Make one data set. An unreadable image is noted in the summary and the others are made.

    Args:
        folders: where the data set goes.
        sources: its HR images; they may already lie in ``folders.hr``, as PNG.
        scales: the LR scales to make.
        grid: cut sub-images; None for none.
        lmdb: store the sub-images (without ``grid``: the images) in LMDBs as well.
        meta_info: write the meta-info files.
        jobs: number of processes.
        overwrite: make again what is already there.

    Raises:
        UserError: wrong arguments, sub-images of another grid are there, or the disk is full or may not be written.
    """
    in_place = _check_in_place(folders, sources)
    if grid is not None:
        _check_grid(grid, scales)
    targets = [folders.hr, *map(folders.lr, scales)]
    try:
        if grid is not None:
            for scale in scales:
                _open_sub_folders(folders, scale, grid, overwrite)
        for target in targets:
            target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{error.filename or folders.root} cannot be written: {error.strerror}.') from error

    summary = Summary()
    work = partial(_prepare_image, folders, scales, grid, in_place, overwrite)
    for result in in_parallel(work, sources, jobs, f'{folders.root.name}: images'):
        if result.error:
            summary.unreadable.append(result.error)
            continue
        summary.made += result.made
        summary.skipped += not result.made
        if result.note:
            summary.converted.append(result.note)
    summary.unreadable.sort()
    summary.converted.sort()
    summary.written += targets

    for gt_folder, lq_folders, meta_path in _stores(folders, scales, grid):
        names = _names_in_all([gt_folder, *lq_folders])
        if grid is not None:
            summary.written += [gt_folder, *lq_folders]
        if meta_info and names:
            summary.written.append(_write_meta_info(gt_folder, names, meta_path))
        if lmdb and names:
            summary.written += [_make_lmdb(folder, names, overwrite) for folder in (gt_folder, *lq_folders)]
    return summary


def sub_image_boxes(height: int, width: int, scale: int, grid: Grid) -> list[tuple[int, int, int, int]]:
    """Where sub-images lie in an LR image of (height, width): (top, left, height, width) of each, row by row.

    A rest at the right or at the bottom that is larger than ``thresh_size`` gets one more sub-image, flush with the
    border. An image smaller than a sub-image is one by itself.
    """
    crop, step, thresh = grid.crop_size // scale, grid.step // scale, grid.thresh_size / scale
    tops, lefts = (_positions(length, crop, step, thresh) for length in (height, width))
    return [(top, left, min(crop, height), min(crop, width)) for top in tops for left in lefts]


def _positions(length: int, crop: int, step: int, thresh: float) -> list[int]:
    if length <= crop:
        return [0]
    positions = list(range(0, length - crop + 1, step))
    if length - (positions[-1] + crop) > thresh:
        positions.append(length - crop)
    return positions


def _prepare_image(
    folders: DataSetFolders, scales: list[int], grid: Grid | None, in_place: bool, overwrite: bool, source: Source
) -> _Result:
    """Everything that is made of one HR image."""
    name = f'{source.stem}.png'
    try:
        height, width = image_size(source.path)
        if min(height, width) < max(scales):
            raise DataError(f'{source.path} ({height}x{width}) is too small for scale {max(scales)}.')
        want_hr = not in_place and (overwrite or not _has_size(folders.hr / name, height, width))
        wanted = [
            scale
            for scale in scales
            if overwrite
            or not _has_size(folders.lr(scale) / name, height // scale, width // scale)
            or not _has_sub_images(folders, source.stem, height // scale, width // scale, scale, grid)
        ]
        if not want_hr and not wanted:
            return _Result()
        hr = decode_rgb(source.path)
        conversion = describe_conversion(source.path)
    except DataError as error:
        return _Result(error=str(error))
    if want_hr:
        _place_hr(source.path, folders.hr / name, hr, as_it_is=conversion is None)
    for scale in wanted:
        gt = modcrop(hr, scale)
        lq = imresize_bicubic(gt, scale)
        write_png(folders.lr(scale) / name, lq)
        if grid is not None:
            boxes = sub_image_boxes(*lq.shape[:2], scale, grid)
            for sub_name, (top, left, h, w) in zip(_sub_names(source.stem, len(boxes)), boxes):
                write_png(folders.lr_sub(scale) / sub_name, lq[top : top + h, left : left + w])
                top, left, h, w = (scale * value for value in (top, left, h, w))
                write_png(folders.hr_sub(scale) / sub_name, gt[top : top + h, left : left + w])
    return _Result(made=True, note=f'{source.path}: {conversion}' if conversion else None)


def _place_hr(source: Path, target: Path, hr: np.ndarray, as_it_is: bool) -> None:
    """Put an HR image into the data set: a hard link to an 8-bit RGB PNG where that is possible, else a new file."""
    if as_it_is and source.suffix.lower() == '.png':
        link = target.with_name(f'.{target.name}.link')
        with contextlib.suppress(OSError):  # another disk, or a file system or a file that allows no links
            link.unlink(missing_ok=True)
            os.link(source.resolve(), link)
            os.replace(link, target)
            link.unlink(missing_ok=True)  # still there if both were links to one file already
            return
    write_png(target, hr)


def _has_size(path: Path, height: int, width: int) -> bool:
    if not path.exists():
        return False
    try:
        return image_size(path) == (height, width)
    except DataError:
        return False


def _sub_names(stem: str, count: int) -> list[str]:
    return [f'{stem}_s{number:03d}.png' for number in range(1, count + 1)]


def _has_sub_images(folders: DataSetFolders, stem: str, height: int, width: int, scale: int, grid: Grid | None) -> bool:
    if grid is None:
        return True
    names = _sub_names(stem, len(sub_image_boxes(height, width, scale, grid)))
    return all((folder / name).exists() for folder in (folders.hr_sub(scale), folders.lr_sub(scale)) for name in names)


def _check_in_place(folders: DataSetFolders, sources: list[Source]) -> bool:
    """Whether the sources are the HR folder of the data set itself."""
    hr = os.path.realpath(folders.hr)
    inside = [source for source in sources if os.path.realpath(source.path.parent) == hr]
    if inside and len(inside) < len(sources):
        raise UserError(f'Some of the images given lie in {folders.hr} already: add the others alone.')
    for source in inside:
        if source.path.name != f'{source.stem}.png':
            raise UserError(
                f'{source.path} lies in the HR folder of the data set, where images must be PNG files: '
                f'move the published images to another folder and name that as --hr.'
            )
    return bool(inside)


def _check_grid(grid: Grid, scales: list[int]) -> None:
    for scale in scales:
        for key, value in (('crop-size', grid.crop_size), ('step', grid.step)):
            if value < 1 or value % scale:
                raise UserError(f'--{key} {value} is not a positive multiple of scale {scale}.')
    if grid.thresh_size < 0:
        raise UserError(f'--thresh-size must not be negative, but is {grid.thresh_size}.')


def _open_sub_folders(folders: DataSetFolders, scale: int, grid: Grid, overwrite: bool) -> None:
    """Make the two sub-image folders; a note in the first one says with which grid, so that two grids never mix."""
    note = folders.hr_sub(scale) / _GRID_FILE
    found = _read_grid(note)
    if overwrite and found is not None:
        shutil.rmtree(folders.hr_sub(scale))
        shutil.rmtree(folders.lr_sub(scale), ignore_errors=True)
    elif found is None and folders.hr_sub(scale).is_dir() and list_images(folders.hr_sub(scale)):
        raise UserError(f'{folders.hr_sub(scale)} holds images that were not made here: move that folder away.')
    elif found is not None and found != grid:
        raise UserError(
            f'{folders.hr_sub(scale)} holds sub-images of another grid (--crop-size {found.crop_size} --step '
            f'{found.step} --thresh-size {found.thresh_size}): give the same values, or --overwrite.'
        )
    for folder in (folders.hr_sub(scale), folders.lr_sub(scale)):
        folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(note) as temporary:
        temporary.write_text(json.dumps(vars(grid)))


def _read_grid(note: Path) -> Grid | None:
    try:
        return Grid(**json.loads(note.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f'{note} is not readable ({error}): remove that folder.') from error


def _stores(folders: DataSetFolders, scales: list[int], grid: Grid | None) -> Iterator[tuple[Path, list[Path], Path]]:
    """The (GT folder, LQ folders, meta-info file) that belong together: HR serves all scales, sub-images one each."""
    if grid is None:
        yield folders.hr, [folders.lr(scale) for scale in scales], folders.meta_info
    else:
        for scale in scales:
            yield folders.hr_sub(scale), [folders.lr_sub(scale)], folders.meta_info_sub(scale)


def _names_in_all(folders: list[Path]) -> list[str]:
    """The images that every one of the folders has: an unreadable image has no LR and drops out here."""
    return sorted(set.intersection(*(set(list_images(folder)) for folder in folders)))


def _write_meta_info(folder: Path, names: list[str], path: Path) -> Path:
    """basicsr's meta-info file: ``name.png (h,w,c)`` for each GT image."""
    with atomic_path(path) as temporary, open(temporary, 'w', encoding='utf-8') as file:
        for name in names:
            height, width = image_size(folder / name)
            file.write(f'{name} ({height},{width},3)\n')
    return path


def _make_lmdb(folder: Path, names: list[str], overwrite: bool) -> Path:
    """Build ``<folder>.lmdb`` unless it is there and holds exactly these images."""
    target = folder.with_name(f'{folder.name}.lmdb')
    if not overwrite and target.exists():
        with contextlib.suppress(DataError):  # a broken one is built again
            if read_meta_info(target / 'meta_info.txt').keys() == {os.path.splitext(name)[0] for name in names}:
                return target
    build_lmdb(folder, names, target, tqdm(names, desc=target.name, unit='image', disable=None))
    return target


def in_parallel(work, items: list, jobs: int, title: str) -> Iterable:
    """Results of ``work(item)`` in any order, with a progress bar."""
    bar = partial(tqdm, total=len(items), desc=title, unit='image', disable=None)
    if jobs == 1 or len(items) < 2:
        yield from bar(map(work, items))
        return
    with multiprocessing.Pool(min(jobs, len(items))) as pool:
        yield from bar(pool.imap_unordered(work, items))
