"""The LQ/GT pairs of a data set: found, checked and read, from folders or from LMDBs."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ppsr.data.lmdb_store import open_lmdb, read_lmdb, read_meta_info
from ppsr.errors import DataError
from ppsr.images import image_size, is_special, list_images

__all__ = ['FolderPairs', 'LmdbPairs', 'check_pair_sizes', 'open_pairs', 'option', 'read_names']


# where the name ends in a line of a meta-info file
_META_SHAPE = re.compile(r'\s+\(\s*\d+\s*,\s*\d+\s*(?:,\s*\d+\s*)?\)(?=\s|$)')


class FolderPairs:
    """Pairs of image files.

    Args:
        lq_folder, gt_folder: the folders.
        filename_tmpl: the LQ name (without suffix) of a GT name: ``'{}'``, or ``'{}x4'`` as in DIV2K's own LR folders.
        meta_info_file: a file that names the GT images to use, one a line, before their shape; by default all in the
            folder. Names may begin with subfolders; the LQ image lies in the same one, or in `lq_folder` itself.

    Raises:
        DataError: a folder is missing or empty, or images do not pair.
    """

    def __init__(self, lq_folder: str, gt_folder: str, filename_tmpl: str = '{}', meta_info_file: str | None = None):
        self.lq_folder, self.gt_folder = lq_folder, gt_folder
        if '{}' not in filename_tmpl:
            raise DataError(f"filename_tmpl must contain '{{}}', but is {filename_tmpl!r}.")
        if meta_info_file is not None:
            for folder in (lq_folder, gt_folder):
                _require_folder(folder)
            names = read_names(meta_info_file)
            self._names = _pairs_of_names(lq_folder, gt_folder, filename_tmpl, names, meta_info_file)
            return
        lq_names, gt_names = (_images_by_stem(folder) for folder in (lq_folder, gt_folder))
        # sorted, so that an index means the same image on every file system
        partners = {stem: filename_tmpl.format(stem) for stem in sorted(gt_names)}
        without = [gt_names[stem] for stem, partner in partners.items() if partner not in lq_names]
        if without:
            raise DataError(
                f'{len(without)} of {len(partners)} images in {gt_folder} have no partner in {lq_folder}, '
                f'for example {without[0]!r} (filename_tmpl is {filename_tmpl!r}'
                f'{_template_hint(without[0], lq_names)}).'
            )
        extra = sorted(set(lq_names) - set(partners.values()))
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

    Args:
        lq_lmdb, gt_lmdb: the LMDBs.
        meta_info_file: a file that names the images to use, one a line; by default all.

    Raises:
        DataError: an LMDB is missing, broken or incomplete, or the keys differ.
    """

    def __init__(self, lq_lmdb: str, gt_lmdb: str, meta_info_file: str | None = None):
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
        if meta_info_file is not None:
            wanted = {os.path.splitext(name)[0] for name in read_names(meta_info_file)}
            if missing := sorted(wanted - self._gt_sizes.keys()):
                raise DataError(
                    f'meta_info_file {meta_info_file} names {len(missing)} images that are not in {gt_lmdb}, '
                    f'for example {missing[0]!r}.'
                )
            self._keys = sorted(wanted)

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
    meta_info_file = option(opt, 'meta_info_file') if opt.get('meta_info_file') is not None else None
    if kind == 'lmdb':
        return LmdbPairs(lq, gt, meta_info_file)
    if kind != 'disk':
        raise DataError(f'io_backend of data set {opt.get("name")!r} must have type disk or lmdb, not {kind!r}.')
    for path in (lq, gt):
        if path.rstrip('/').endswith('.lmdb'):
            raise DataError(f'{path} is an LMDB: set "io_backend: {{type: lmdb}}" for data set {opt.get("name")!r}.')
    template = option(opt, 'filename_tmpl') if opt.get('filename_tmpl') is not None else '{}'
    return FolderPairs(lq, gt, template, meta_info_file)


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
            raise DataError(
                f'{gt_path} ({gt_h}x{gt_w}) is smaller than the training patch (gt_size {gt_size}); lower gt_size, or '
                'name the images that are large enough in a meta_info_file.'
            )


def _require_folder(folder: str) -> None:
    if not os.path.exists(folder):
        raise DataError(f'Folder {folder} does not exist: make the data set with "ppsr prepare", or correct the path.')


def _images_by_stem(folder: str, or_none: bool = False) -> dict[str, str]:
    _require_folder(folder)
    by_stem: dict[str, str] = {}
    for name in list_images(folder):
        stem = os.path.splitext(name)[0]
        if stem in by_stem:
            raise DataError(f'{folder} holds both {by_stem[stem]!r} and {name!r}: images are told apart by their stem.')
        by_stem[stem] = name
    if not by_stem and not or_none:
        raise DataError(f'Folder {folder} holds no images.')
    return by_stem


def read_names(meta_info_file: str) -> list[str]:
    """The image names in a meta-info file, each once, in the order of the file.

    A line is a name and, behind blanks or tabs, the shape ``(h,w,c)`` and what else there may be. Names may hold
    blanks; a tab ends one.

    Raises:
        DataError: it cannot be read, or names no images.
    """
    if is_special(meta_info_file):
        raise DataError(f'meta_info_file {meta_info_file} is no regular file.')
    try:
        with open(meta_info_file, encoding='utf-8-sig') as lines:  # an editor on Windows begins it with a mark
            names = [_META_SHAPE.split(line.strip().split('\t')[0])[0].rstrip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'meta_info_file {meta_info_file} cannot be read ({_reason(error)}).') from error
    if not names:
        raise DataError(f'meta_info_file {meta_info_file} names no images.')
    return list(dict.fromkeys(names))


def _pairs_of_names(
    lq_folder: str, gt_folder: str, filename_tmpl: str, names: list[str], meta_info_file: str
) -> list[tuple[str, str]]:
    """(LQ, GT) names in their folders for the GT images that a meta-info file names, sorted."""
    where, pairs, listed = f'meta_info_file {meta_info_file}', {}, {}

    def images(root: str, sub: str) -> dict[str, str]:
        folder = os.path.join(root, sub)
        if folder not in listed:
            listed[folder] = _images_by_stem(folder, or_none=True) if not sub or os.path.isdir(folder) else {}
        return listed[folder]

    missing, without = [], []
    for name in names:
        sub, base = os.path.split(os.path.normpath(name))
        if os.path.isabs(name) or sub.split(os.sep)[0] == os.pardir:
            raise DataError(f'{where} names {name!r}, which lies outside of {gt_folder}.')
        stem = os.path.splitext(base)[0]
        if images(gt_folder, sub).get(stem) != base:
            missing.append(name)
            continue
        partner = filename_tmpl.format(stem)
        for lq_sub in dict.fromkeys([sub, '']):  # BasicSR looks in the folder itself
            if lq := images(lq_folder, lq_sub).get(partner):
                pairs[os.path.join(sub, base)] = os.path.join(lq_sub, lq)
                break
        else:
            without.append(name)
    if missing:
        raise DataError(f'{where} names {len(missing)} images that are not in {gt_folder}, for example {missing[0]!r}.')
    if without:
        raise DataError(
            f'{len(without)} of {len(names)} images that {where} names have no partner in {lq_folder}, '
            f'for example {without[0]!r} (filename_tmpl is {filename_tmpl!r}'
            f'{_template_hint(os.path.basename(without[0]), images(lq_folder, ""))}).'
        )
    used: dict[str, str] = {}
    for gt, lq in pairs.items():
        if (other := used.setdefault(lq, gt)) != gt:
            raise DataError(f'{where}: {other!r} and {gt!r} would both be paired with {lq!r} in {lq_folder}.')
    return [(pairs[gt], gt) for gt in sorted(pairs)]


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
