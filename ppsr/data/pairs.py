"""The LQ/GT pairs of a data set: found, checked and read, from folders or from LMDBs."""

import os
from collections.abc import Mapping
from pathlib import Path

from ppsr.data.lmdb_store import open_lmdb, read_lmdb, read_meta_info
from ppsr.errors import DataError
from ppsr.images import image_size, list_images

__all__ = ['FolderPairs', 'LmdbPairs', 'check_pair_sizes', 'open_pairs', 'option']


class FolderPairs:
    """Pairs of image files.

    Args:
        lq_folder, gt_folder: the folders.
        filename_tmpl: the LQ name (without suffix) of a GT name: ``'{}'``, or ``'{}x4'`` as in DIV2K's own LR folders.
        meta_info_file: a file that names the GT images to use, one a line, first word; by default all in the folder.

    Raises:
        DataError: a folder is missing or empty, or images do not pair.
    """

    def __init__(self, lq_folder: str, gt_folder: str, filename_tmpl: str = '{}', meta_info_file: str | None = None):
        self.lq_folder, self.gt_folder = lq_folder, gt_folder
        if '{}' not in filename_tmpl:
            raise DataError(f"filename_tmpl must contain '{{}}', but is {filename_tmpl!r}.")
        lq_names, gt_names = (_images_by_stem(folder) for folder in (lq_folder, gt_folder))
        if meta_info_file is not None:
            gt_names = _select(gt_names, gt_folder, meta_info_file)
        # sorted, so that an index means the same image on every file system
        partners = {stem: filename_tmpl.format(stem) for stem in sorted(gt_names)}
        without = [gt_names[stem] for stem, partner in partners.items() if partner not in lq_names]
        if without:
            raise DataError(
                f'{len(without)} of {len(partners)} images in {gt_folder} have no partner in {lq_folder}, '
                f'for example {without[0]!r} (filename_tmpl is {filename_tmpl!r}'
                f'{_template_hint(without[0], lq_names)}).'
            )
        extra = [] if meta_info_file is not None else sorted(set(lq_names) - set(partners.values()))
        if extra:
            raise DataError(
                f'{len(extra)} of {len(lq_names)} images in {lq_folder} have no partner in {gt_folder}, '
                f'for example {lq_names[extra[0]]!r}.'
            )
        self._names = [(lq_names[partner], gt_names[stem]) for stem, partner in partners.items()]

    def __len__(self) -> int:
        return len(self._names)

    def paths(self, index: int) -> tuple[str, str]:
        """(LQ path, GT path)."""
        lq, gt = self._names[index]
        return os.path.join(self.lq_folder, lq), os.path.join(self.gt_folder, gt)

    def read(self, index: int) -> tuple[bytes, bytes]:
        """The contents of the two files."""
        lq, gt = self.paths(index)
        return _read_file(lq), _read_file(gt)

    def sizes(self, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of both, from their headers."""
        lq, gt = self.paths(index)
        return image_size(lq), image_size(gt)


class LmdbPairs:
    """Pairs of images in two LMDBs that have the same keys. May be pickled and shared by data sets and threads.

    Raises:
        DataError: an LMDB is missing, broken or incomplete, or the keys differ.
    """

    def __init__(self, lq_lmdb: str, gt_lmdb: str):
        self.lq_folder, self.gt_folder = lq_lmdb, gt_lmdb
        self._lq_sizes, self._gt_sizes = (_complete_meta_info(path) for path in (lq_lmdb, gt_lmdb))
        differing = sorted(self._lq_sizes.keys() ^ self._gt_sizes.keys())
        if differing:
            here = lq_lmdb if differing[0] in self._lq_sizes else gt_lmdb
            raise DataError(
                f'{lq_lmdb} and {gt_lmdb} do not pair: {len(differing)} images are in one of them only, '
                f'for example {differing[0]!r} in {here}.'
            )
        self._keys = sorted(self._gt_sizes)

    def __len__(self) -> int:
        return len(self._keys)

    def paths(self, index: int) -> tuple[str, str]:
        """Names for messages, of the form ``<lmdb>/<key>.png``."""
        name = f'{self._keys[index]}.png'
        return os.path.join(self.lq_folder, name), os.path.join(self.gt_folder, name)

    def read(self, index: int) -> tuple[bytes, bytes]:
        """The contents of the two stored files."""
        key = self._keys[index]
        return read_lmdb(self.lq_folder, key), read_lmdb(self.gt_folder, key)

    def sizes(self, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of both, from the LMDBs' meta_info.txt."""
        key = self._keys[index]
        return self._lq_sizes[key], self._gt_sizes[key]


def option(opt: Mapping, key: str, kind: type = str):
    """An entry of a data set's options.

    Raises:
        DataError: missing, empty or of another type.
    """
    value = opt.get(key)
    name = opt.get('name', opt.get('type', '?'))
    if value is None:
        raise DataError(f'The options of data set {name!r} lack the key {key!r}.')
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise DataError(f'{key} of data set {name!r} must be of type {kind.__name__}, but is {value!r}.')
    return os.path.expanduser(value) if kind is str else value


def open_pairs(opt: Mapping) -> FolderPairs | LmdbPairs:
    """The pairs that a data set's options name (basicsr's keys: dataroot_lq, dataroot_gt, io_backend, filename_tmpl,
    meta_info_file).

    Raises:
        DataError: an option is missing or wrong, files are missing, or images do not pair.
    """
    lq, gt = option(opt, 'dataroot_lq'), option(opt, 'dataroot_gt')
    backend = opt.get('io_backend') or {'type': 'disk'}
    kind = backend.get('type') if isinstance(backend, Mapping) else backend
    if kind == 'lmdb':
        return LmdbPairs(lq, gt)
    if kind != 'disk':
        raise DataError(f'io_backend of data set {opt.get("name")!r} must have type disk or lmdb, not {kind!r}.')
    for path in (lq, gt):
        if path.rstrip('/').endswith('.lmdb'):
            raise DataError(f'{path} is an LMDB: set "io_backend: {{type: lmdb}}" for data set {opt.get("name")!r}.')
    meta_info_file = opt.get('meta_info_file')
    return FolderPairs(
        lq,
        gt,
        option(opt, 'filename_tmpl') if opt.get('filename_tmpl') is not None else '{}',
        option(opt, 'meta_info_file') if meta_info_file is not None else None,
    )


def check_pair_sizes(
    pairs: FolderPairs | LmdbPairs,
    scale: int,
    gt_size: int | None = None,
    limit: int | None = 1000,
    exact: bool = False,
) -> None:
    """Check that GT is ``scale`` times LQ, reading headers only.

    GT may have up to ``scale - 1`` rows and columns more, as images have that were not cropped; they are not used.

    Args:
        pairs: what to check.
        scale: the scale.
        gt_size: side of the training patch: every GT image must hold one.
        limit: look at this many pairs at most, spread evenly over folders; None for all. LMDBs are always looked at in
            full, they know their sizes.
        exact: refuse GT images with more rows or columns than ``scale`` times LQ.

    Raises:
        DataError: the first pair that does not fit.
    """
    count = len(pairs)
    step = 1 if limit is None or isinstance(pairs, LmdbPairs) else max(1, -(-count // limit))
    slack = 1 if exact else scale
    for index in range(0, count, step):
        (lq_h, lq_w), (gt_h, gt_w) = pairs.sizes(index)
        lq_path, gt_path = pairs.paths(index)
        if not (0 <= gt_h - lq_h * scale < slack and 0 <= gt_w - lq_w * scale < slack):
            raise DataError(
                f'{gt_path} ({gt_h}x{gt_w}) is not {scale} times {lq_path} ({lq_h}x{lq_w}): '
                f'the images do not fit scale {scale}.'
            )
        if gt_size is not None and min(lq_h, lq_w) * scale < gt_size:
            raise DataError(f'{gt_path} ({gt_h}x{gt_w}) is smaller than the training patch (gt_size {gt_size}).')


def _images_by_stem(folder: str) -> dict[str, str]:
    if not os.path.exists(folder):
        raise DataError(f'Folder {folder} does not exist: make the data set with "ppsr prepare", or correct the path.')
    by_stem: dict[str, str] = {}
    for name in list_images(folder):
        stem = os.path.splitext(name)[0]
        if stem in by_stem:
            raise DataError(f'{folder} holds both {by_stem[stem]!r} and {name!r}: images are told apart by their stem.')
        by_stem[stem] = name
    if not by_stem:
        raise DataError(f'Folder {folder} holds no images.')
    return by_stem


def _select(gt_names: dict[str, str], gt_folder: str, meta_info_file: str) -> dict[str, str]:
    """The images that a meta-info file names."""
    try:
        with open(meta_info_file, encoding='utf-8') as lines:
            # the name ends before the shape, not at the first space: names may hold spaces
            wanted = [line.strip().rsplit(' (', 1)[0] for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'meta_info_file {meta_info_file} cannot be read ({_reason(error)}).') from error
    if not wanted:
        raise DataError(f'meta_info_file {meta_info_file} names no images.')
    selected = {os.path.splitext(name)[0]: name for name in wanted}
    missing = [name for stem, name in selected.items() if gt_names.get(stem) != name]
    if missing:
        raise DataError(
            f'meta_info_file {meta_info_file} names {len(missing)} images that are not in {gt_folder}, '
            f'for example {missing[0]!r}.'
        )
    return selected


def _template_hint(gt_name: str, lq_names: dict[str, str]) -> str:
    """'; did you mean ...' when LQ names are GT names with something added, as in DIV2K's own LR folders."""
    stem = os.path.splitext(gt_name)[0]
    for lq_stem in lq_names:
        if lq_stem.startswith(stem) and not lq_stem[len(stem) :].isdigit():
            return f'; for {lq_names[lq_stem]!r} it would be {"{}" + lq_stem[len(stem) :]!r}'
    return ''


def _complete_meta_info(path: str) -> dict[str, tuple[int, int]]:
    """Sizes by key of an LMDB of which at least as many images are stored as its meta file names."""
    if not os.path.isdir(path):
        raise DataError(f'LMDB {path} does not exist or is not a folder.')
    sizes = read_meta_info(os.path.join(path, 'meta_info.txt'))
    stored = open_lmdb(path).stat()['entries']
    if stored != len(sizes):
        raise DataError(
            f'The LMDB {path} is incomplete: its meta_info.txt names {len(sizes)} images, but {stored} are stored; '
            f'build it again with "ppsr prepare --overwrite".'
        )
    return sizes


def _read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f'{path} cannot be read ({_reason(error)}).') from error


def _reason(error: Exception) -> str:
    return getattr(error, 'strerror', None) or str(error)
