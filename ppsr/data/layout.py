"""Where the images of a data set lie: the one layout of this project, and the published ones it is made from.

Everything that ``ppsr prepare`` writes and the option files name (N is the scale)::

    datasets/<Name>/HR/<image>.png              high resolution, 8-bit RGB, not cropped: one folder for all scales
    datasets/<Name>/LRbicxN/<image>.png         exact bicubic LR of HR cropped to a multiple of N; same file names
    datasets/<Name>/HR_xN_sub/, LRbicxN_sub/    overlapping sub-images for fast training, <image>_s001.png, ...
    datasets/<Name>/HR.lmdb, LRbicxN.lmdb       the same images as LMDB; HR_xN_sub.lmdb, LRbicxN_sub.lmdb: sub-images
    datasets/<Name>/meta_info.txt               names and HR sizes; meta_info_xN_sub.txt: of the sub-images
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ppsr.errors import DataError
from ppsr.images import list_images

__all__ = ['DataSetFolders', 'Source', 'find_sources']

# Folder names under which images of the known data sets are published, and the name that the data set gets here.
_NAMES = {
    'DIV2K_train_HR': 'DIV2K',
    'DIV2K_valid_HR': 'DIV2K_valid',
    'Flickr2K_HR': 'Flickr2K',
    'B100': 'BSD100',
    'BSDS100': 'BSD100',
}
_BENCHMARKS = ('Set5', 'Set14', 'BSD100', 'B100', 'BSDS100', 'Urban100', 'Manga109')
# Subfolders in which a data set's HR images are found, in order of preference.
_HR_FOLDERS = ('HR', 'DIV2K_train_HR', 'Flickr2K_HR', 'original')
# The files of Huang et al. (Urban100): img_001_SRF_4_HR.png, cropped for x4, beside LR images and results of methods.
_SRF = re.compile(r'(?P<stem>.+)_SRF_(?P<scale>\d+)_(?P<kind>.+)')


@dataclass(frozen=True)
class DataSetFolders:
    """The paths of one data set in the layout above; ``root`` is ``datasets/<Name>``."""

    root: Path

    @property
    def hr(self) -> Path:
        return self.root / 'HR'

    def lr(self, scale: int) -> Path:
        return self.root / f'LRbicx{scale}'

    def hr_sub(self, scale: int) -> Path:
        return self.root / f'HR_x{scale}_sub'

    def lr_sub(self, scale: int) -> Path:
        return self.root / f'LRbicx{scale}_sub'

    @property
    def meta_info(self) -> Path:
        return self.root / 'meta_info.txt'

    def meta_info_sub(self, scale: int) -> Path:
        return self.root / f'meta_info_x{scale}_sub.txt'

    def scales(self) -> list[int]:
        """The scales for which there is an LR folder."""
        found = (re.fullmatch(r'LRbicx(\d+)', path.name) for path in self.root.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in found if match)


@dataclass(frozen=True)
class Source:
    """One published HR image: the name it gets here (without suffix) and its file."""

    stem: str
    path: Path


def find_sources(folders: list[Path], scales: list[int], name: str | None = None) -> dict[str, list[Source]]:
    """Find the HR images under the given folders, in any of the known layouts.

    A folder may hold images itself, or be the root of a published data set (``DIV2K/DIV2K_train_HR``, ``Set5/HR``,
    ``Urban100/image_SRF_4``), or hold several of the benchmarks (``benchmark/Set5/HR``, ``benchmark/B100/HR``).

    Args:
        folders: where to look.
        scales: the scales to be made; images that were cropped for another scale are refused.
        name: put everything into one data set of this name. By default every folder is a data set of its own, named
            after its folder.

    Returns:
        For each data set its images, sorted by name.

    Raises:
        DataError: a folder is missing or holds no images, two images have one name, or the images were cropped for a
            scale other than those asked for; or two folders have one name.
    """
    found: dict[str, dict[str, Source]] = {}
    seen: dict[str, Path] = {}
    for folder in folders:
        for own_name, image_folder in _resolve(Path(folder), scales):
            other = seen.setdefault(name or own_name, image_folder)
            if os.path.realpath(other) == os.path.realpath(image_folder) and own_name in found:
                continue
            if name is None and os.path.realpath(other) != os.path.realpath(image_folder):
                raise DataError(
                    f'{other} and {image_folder} would both become the data set {own_name!r}; give --name for one data '
                    'set of both, or run them apart, each with a --name of its own.'
                )
            images = found.setdefault(name or own_name, {})
            for source in _images(image_folder, scales):
                other = images.setdefault(source.stem, source)
                if other.path != source.path:
                    raise DataError(f'{other.path} and {source.path} would both become {source.stem}.png; rename one.')
    return {key: sorted(images.values(), key=lambda source: source.stem) for key, images in found.items()}


def _resolve(folder: Path, scales: list[int]) -> list[tuple[str, Path]]:
    """The (data set name, image folder) pairs that a folder given by the user stands for."""
    if list_images(folder):
        return [(_data_set_name(folder), folder)]
    inner = list(_HR_FOLDERS)
    if len(scales) == 1:
        inner.append(f'image_SRF_{scales[0]}')
    for sub in inner:
        if (folder / sub).is_dir() and list_images(folder / sub):
            return [(_data_set_name(folder / sub), folder / sub)]
    benchmarks = [pair for sub in _BENCHMARKS if (folder / sub).is_dir() for pair in _resolve(folder / sub, scales)]
    if not benchmarks:
        hint = ''
        if any(folder.glob('image_SRF_*')):
            hint = '; its image_SRF_<N> folders were cropped for one scale each: give one --scale'
        raise DataError(f'No images in {folder} or in one of its known subfolders ({", ".join(_HR_FOLDERS)}){hint}.')
    return benchmarks


def _data_set_name(folder: Path) -> str:
    folder = Path(os.path.abspath(folder))
    if folder.name in ('HR', 'original') or folder.name.startswith('image_SRF_'):
        folder = folder.parent
    return _NAMES.get(folder.name, folder.name)


def _images(folder: Path, scales: list[int]) -> list[Source]:
    sources = []
    for file_name in list_images(folder):
        stem = os.path.splitext(file_name)[0]
        match = _SRF.fullmatch(stem)
        if match:
            if match['kind'] != 'HR':
                continue
            if scales != [int(match['scale'])]:
                raise DataError(
                    f'The images in {folder} were cropped for scale {match["scale"]}: '
                    f'give --scale {match["scale"]}, or the uncropped images.'
                )
            stem = match['stem']
        sources.append(Source(stem, folder / file_name))
    return sources
