"""From folders of HR images to what the option files name: exact LR, sub-images, meta-info files and LMDBs.

The layout is that of :mod:`ppsr.data.layout`. Every file appears under its name when it is whole, so an interrupted run
is resumed by starting it again: what is there and is what would be made is skipped. What is there and is something else
is only replaced on demand, together with everything that was made of it; one process at a time writes a data set.
"""

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ppsr.atomic import PREFIX, atomic_path
from ppsr.data.bicubic import imresize_bicubic, modcrop
from ppsr.data.layout import DataSetFolders, Source
from ppsr.data.lmdb_store import build_lmdb, read_lmdb, read_meta_info
from ppsr.errors import DataError, UserError
from ppsr.images import decode_rgb, describe_conversion, image_size, list_images, write_png
from ppsr.locks import Lock

__all__ = ['Grid', 'Summary', 'in_parallel', 'prepare_dataset', 'read_grid', 'sub_image_boxes', 'sub_names']

GRID_FILE = '.grid.json'
LOCK = '.lock'


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
    replaced: int = 0  # HR images that were there and were others
    converted: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class _Result:
    made: bool = False
    replaced: bool = False
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
    new = not folders.root.exists()
    try:
        with Lock(folders.root / LOCK, f'The data set {folders.root}'):
            return _prepare_locked(folders, sources, scales, grid, lmdb, meta_info, jobs, overwrite, in_place)
    finally:
        if new:
            with contextlib.suppress(OSError):  # of a run that was refused, only an empty folder would stay
                folders.root.rmdir()


def _prepare_locked(folders, sources, scales, grid, lmdb, meta_info, jobs, overwrite, in_place) -> Summary:
    _remove_leftovers(folders.root)
    if grid is not None:
        for scale in scales:
            _other_grid(folders, scale, grid, overwrite, sources)
    if not overwrite:
        inspect = partial(_differing, folders, scales, grid, in_place)
        found = sorted(
            path for paths in in_parallel(inspect, sources, jobs, f'{folders.root.name}: check') for path in paths
        )
        if found:
            raise UserError(
                f'{_some(found)} would be replaced: what is there is not what these images give; give --overwrite to '
                'replace it, or another --name.'
            )
    targets = [folders.hr, *map(folders.lr, scales)]
    try:
        if grid is not None:
            for scale in scales:
                _open_sub_folders(folders, scale, grid, overwrite, sources)
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
        summary.replaced += result.replaced
        summary.skipped += not result.made
        if result.note:
            summary.converted.append(result.note)
    summary.unreadable.sort()
    summary.converted.sort()
    summary.written += targets

    asked = list(_stores(folders, scales, grid))
    if grid is not None:
        summary.written += [folder for gt_folder, lq_folders, _ in asked for folder in (gt_folder, *lq_folders)]
    others = [store for store in _stores_there(folders) if store not in asked] if summary.replaced else []
    for store in (*asked, *others):
        gt_folder, lq_folders, meta_path = store
        own = store in asked
        names = _names_in_all([gt_folder, *lq_folders])
        # what was made of images that have been replaced is made again, whether it was asked for or not
        if names and ((meta_info and own) or (summary.replaced and meta_path.exists())):
            fit = [name for name in names if _fits_a_line(gt_folder / name, summary)]
            summary.written.append(_write_meta_info(gt_folder, fit, meta_path, overwrite))
        if names and ((lmdb and own) or (summary.replaced and _lmdb_of(gt_folder).exists())):
            fit = [name for name in names if _fits_a_key(gt_folder / name, summary)]
            summary.written += [_make_lmdb(folder, fit, overwrite) for folder in (gt_folder, *lq_folders)]
    summary.unreadable = sorted(set(summary.unreadable))
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
        target = folders.hr / name
        want_hr = not in_place and (overwrite or not target.exists())
        # everything that was made of it is out of date, too, asked for or not
        replaced = want_hr and target.exists() and not _same_image(source.path, target)
        if replaced:
            scales = sorted({*scales, *(scale for scale in folders.scales() if (folders.lr(scale) / name).exists())})
        wanted = [
            scale
            for scale in scales
            if overwrite
            or not (folders.lr(scale) / name).exists()
            or not _has_sub_images(folders, source.stem, height // scale, width // scale, scale, grid)
        ]
        if not want_hr and not wanted:
            return _Result()
        hr = decode_rgb(source.path)
        conversion = describe_conversion(source.path)
    except DataError as error:
        return _Result(error=str(error))
    if replaced:  # first of all: an interrupted run must not leave them beside the new image
        for scale in scales:
            (folders.lr(scale) / name).unlink(missing_ok=True)
            _remove_sub_images(folders, scale, source.stem, 0)
    if want_hr:
        _place_hr(source.path, target, hr, as_it_is=conversion is None)
    for scale in wanted:
        gt = modcrop(hr, scale)
        lq = imresize_bicubic(gt, scale)
        write_png(folders.lr(scale) / name, lq)
        own_grid = read_grid(folders.hr_sub(scale) / GRID_FILE) if replaced and grid is None else grid
        if own_grid is not None:
            boxes = sub_image_boxes(*lq.shape[:2], scale, own_grid)
            _remove_sub_images(folders, scale, source.stem, len(boxes))
            for sub_name, (top, left, h, w) in zip(sub_names(source.stem, len(boxes)), boxes):
                write_png(folders.lr_sub(scale) / sub_name, lq[top : top + h, left : left + w])
                top, left, h, w = (scale * value for value in (top, left, h, w))
                write_png(folders.hr_sub(scale) / sub_name, gt[top : top + h, left : left + w])
    return _Result(made=True, replaced=replaced, note=f'{source.path}: {conversion}' if conversion else None)


def _place_hr(source: Path, target: Path, hr: np.ndarray, as_it_is: bool) -> None:
    """Put an HR image into the data set: a hard link to an 8-bit RGB PNG where that is possible, else a new file."""
    if as_it_is and source.suffix.lower() == '.png':
        link = target.with_name(f'{PREFIX}{secrets.token_hex(8)}.part.png')
        try:
            os.link(source.resolve(), link)
            os.replace(link, target)
            return
        except OSError:  # another disk, or a file system or a file that allows no links
            pass
        finally:
            link.unlink(missing_ok=True)  # still there if both were links to one file already
    write_png(target, hr)


def _differing(
    folders: DataSetFolders, scales: list[int], grid: Grid | None, in_place: bool, source: Source
) -> list[str]:
    """The files of the data set that are there and are not what this HR image gives.

    Pixels are compared only where the image is younger than what was made of it.
    """
    name, found = f'{source.stem}.png', []
    try:
        height, width = image_size(source.path)
        target = folders.hr / name
        if not in_place and target.exists() and not _same_image(source.path, target):
            return [str(target)]
        for scale in scales:
            lr = folders.lr(scale) / name
            if lr.exists() and not _is_lr_of(lr, source.path, scale):
                found.append(str(lr))
            if grid is not None:
                first = len(sub_image_boxes(height // scale, width // scale, scale, grid)) + 1
                surplus = (folder / _sub_name(source.stem, first) for folder in _sub_folders(folders, scale))
                found += [str(path) for path in surplus if path.exists()]
    except (DataError, ZeroDivisionError):  # told when its turn comes
        return []
    return found


def _younger(source: Path, made: Path) -> bool:
    found = source.stat()
    return max(found.st_mtime, found.st_ctime) > made.stat().st_mtime


def _same_image(source: Path, target: Path) -> bool:
    if os.path.samefile(source, target):
        return True
    try:
        if image_size(source) != image_size(target):
            return False
        return not _younger(source, target) or np.array_equal(decode_rgb(source), decode_rgb(target))
    except DataError:
        return False


def _is_lr_of(lr: Path, source: Path, scale: int) -> bool:
    try:
        height, width = image_size(source)
        if image_size(lr) != (height // scale, width // scale):
            return False
        return not _younger(source, lr) or np.array_equal(
            imresize_bicubic(modcrop(decode_rgb(source), scale), scale), decode_rgb(lr)
        )
    except DataError:
        return False


def _some(paths: list) -> str:
    return ', '.join(map(str, paths[:3])) + (f' and {len(paths) - 3} more' if len(paths) > 3 else '')


def _remove_leftovers(root: Path) -> None:
    """Temporary files of runs that were killed; nobody else writes here while the lock is held."""
    for path in (*root.glob(f'{PREFIX}*'), *root.glob(f'*/{PREFIX}*')):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sub_names(stem: str, count: int) -> list[str]:
    """File names of the sub-images of an image."""
    return [_sub_name(stem, number) for number in range(1, count + 1)]


def _sub_name(stem: str, number: int) -> str:
    return f'{stem}_s{number:03d}.png'


def _sub_folders(folders: DataSetFolders, scale: int) -> tuple[Path, Path]:
    return folders.hr_sub(scale), folders.lr_sub(scale)


def _remove_sub_images(folders: DataSetFolders, scale: int, stem: str, keep: int) -> None:
    """Remove the sub-images of an image behind the first `keep`."""
    for folder in _sub_folders(folders, scale):
        number = keep + 1
        while (folder / _sub_name(stem, number)).exists():
            (folder / _sub_name(stem, number)).unlink()
            number += 1


def _has_sub_images(folders: DataSetFolders, stem: str, height: int, width: int, scale: int, grid: Grid | None) -> bool:
    if grid is None:
        return True
    names = sub_names(stem, len(sub_image_boxes(height, width, scale, grid)))
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


def _other_grid(folders: DataSetFolders, scale: int, grid: Grid, overwrite: bool, sources: list[Source]) -> bool:
    """Whether sub-images of another grid are there, to be replaced.

    Raises:
        UserError: they are and may not be, or images are there that are no sub-images of ours.
    """
    folder = folders.hr_sub(scale)
    found = read_grid(folder / GRID_FILE)
    if found is None and folder.is_dir() and list_images(folder):
        raise UserError(f'{folder} holds images that were not made here: move that folder away.')
    if found in (None, grid):
        return False
    if not overwrite:
        raise UserError(
            f'{folder} holds sub-images of another grid (--crop-size {found.crop_size} --step {found.step} '
            f'--thresh-size {found.thresh_size}): give the same values, or --overwrite.'
        )
    stems = {source.stem for source in sources}
    lost = [name for name in list_images(folder) if name.rsplit('_s', 1)[0] not in stems]
    if lost:
        raise UserError(
            f'{folder} holds sub-images of another grid of images that are not in --hr ({_some(lost)}): name their '
            'folder, too, or give the same grid.'
        )
    return True


def _open_sub_folders(folders: DataSetFolders, scale: int, grid: Grid, overwrite: bool, sources: list[Source]) -> None:
    """Make the two sub-image folders; a note in the first one says with which grid, so that two grids never mix."""
    if _other_grid(folders, scale, grid, overwrite, sources):
        for folder in _sub_folders(folders, scale):
            shutil.rmtree(folder, ignore_errors=True)
    for folder in _sub_folders(folders, scale):
        folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folders.hr_sub(scale) / GRID_FILE) as temporary:
        temporary.write_text(json.dumps(vars(grid)))


def read_grid(note: Path) -> Grid | None:
    """The grid that a folder of sub-images was cut with, from its note; None without one."""
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


def _stores_there(folders: DataSetFolders) -> Iterator[tuple[Path, list[Path], Path]]:
    """Those of :func:`_stores` that the data set has."""
    scales = folders.scales()
    yield from _stores(folders, scales, None)
    yield from _stores(folders, [scale for scale in scales if folders.hr_sub(scale).is_dir()], Grid())


def _fits_a_line(path: Path, summary: Summary) -> bool:
    """Whether a meta-info file can name the image; if not, that is said."""
    try:
        path.name.encode()
        fits = path.name.isprintable() and path.name == path.name.strip()
    except UnicodeEncodeError:
        fits = False
    if not fits:
        summary.unreadable.append(f'{path} has a name that no line of a meta-info file can hold: rename it.')
    return fits


def _fits_a_key(path: Path, summary: Summary) -> bool:
    """Whether the name can be a key of an LMDB; if not, that is said."""
    fits = path.name.isascii() and path.name.isprintable()
    if not fits:
        summary.unreadable.append(
            f'{path} cannot be a key of an LMDB and is not in it: basicsr allows ASCII names only; rename it.'
        )
    return fits


def _names_in_all(folders: list[Path]) -> list[str]:
    """The images that every one of the folders has: an unreadable image has no LR and drops out here."""
    return sorted(set.intersection(*(set(list_images(folder)) for folder in folders)))


def _write_meta_info(folder: Path, names: list[str], path: Path, overwrite: bool) -> Path:
    """basicsr's meta-info file: ``name.png (h,w,c)`` for each GT image. Lines are added to one that is there."""
    lines = ['{} ({},{},3)'.format(name, *image_size(folder / name)) for name in names]
    if path.exists() and not overwrite:
        lost = set(path.read_text(encoding='utf-8', errors='replace').split('\n')) - {*lines, ''}
        if lost:
            raise UserError(
                f'{path} would lose what it says of {_some(sorted(lost))}; give --overwrite to write it anew.'
            )
    with atomic_path(path) as temporary:
        temporary.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
    return path


def _make_lmdb(folder: Path, names: list[str], overwrite: bool) -> Path:
    """Build ``<folder>.lmdb`` unless it holds exactly these images; without `overwrite`, images are only added."""
    target = _lmdb_of(folder)
    if not overwrite and target.exists():
        with contextlib.suppress(DataError):  # a broken one is built again
            keys = read_meta_info(target / 'meta_info.txt').keys()
            wanted = {os.path.splitext(name)[0]: folder / name for name in names}
            lost = [key for key in keys if key not in wanted]
            lost += [key for key in keys & wanted.keys() if not _holds(target, key, wanted[key])]
            if lost:
                raise UserError(
                    f'{target} holds other images than {folder} ({_some(sorted(lost))}); give --overwrite to build it '
                    'anew.'
                )
            if keys == wanted.keys():
                return target
    build_lmdb(folder, names, target, tqdm(names, desc=target.name, unit='image', disable=None))
    return target


def _lmdb_of(folder: Path) -> Path:
    return folder.with_name(f'{folder.name}.lmdb')


def _holds(target: Path, key: str, file: Path) -> bool:
    """Whether an LMDB holds this file; looked at only if the file is the younger one."""
    return not _younger(file, target / 'data.mdb') or read_lmdb(target, key) == file.read_bytes()


def in_parallel(work, items: list, jobs: int, title: str) -> Iterable:
    """Results of ``work(item)`` in any order, with a progress bar.

    Raises:
        UserError: a worker was killed (mostly: out of memory).
    """
    bar = partial(tqdm, total=len(items), desc=title, unit='image', disable=None)
    if jobs == 1 or len(items) < 2:
        yield from bar(map(work, items))
        return
    with ProcessPoolExecutor(min(jobs, len(items)), initializer=_begin_worker, initargs=(os.getpid(),)) as pool:
        try:
            futures = [pool.submit(_in_worker, work, item) for item in items]
            yield from (future.result() for future in bar(as_completed(futures)))
        except BrokenProcessPool:
            raise UserError(
                'A worker process was killed, mostly because memory ran out; run again with fewer --jobs, it resumes.'
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)  # images under way are finished, no others are begun


def _begin_worker(parent: int) -> None:
    """Workers leave Ctrl-C and a closed terminal to their parent, and end when it asks or when it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'SIGHUP'):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was killed before that
            os._exit(0)


def _in_worker(work, item):
    try:
        return work(item)
    except SystemExit as end:  # by now temporary files are removed; the executor would take it for a result
        os._exit(end.code)
