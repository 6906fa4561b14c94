"""The data set of LQ/GT pairs for super-resolution: basicsr's ``PairedImageDataset`` for data sets as they really are.

Same options and same samples for the same random state. What is different:

- pairs are found by name in linear time, sorted, and checked at the start; what is wrong is said in one sentence;
- GT that was not cropped to a multiple of the scale is cropped on reading, in training too: one HR folder serves all
  scales;
- a broken image is named, instead of an AttributeError about None;
- several data sets may read one LMDB, spawn workers may read it, and keys may contain dots.
"""

from collections.abc import Mapping

import numpy as np
import torch
from basicsr.data.transforms import augment, paired_random_crop
from basicsr.utils.registry import DATASET_REGISTRY
from torch.utils import data

from ppsr.data.pairs import check_pair_sizes, open_pairs, option
from ppsr.errors import DataError
from ppsr.images import decode_rgb, to_tensor
from ppsr.registry import register

__all__ = ['PairedSRDataset']


@register(DATASET_REGISTRY)
class PairedSRDataset(data.Dataset):
    """Pairs of RGB images in [0, 1].

    Args:
        opt: options of the data set.

            dataroot_gt, dataroot_lq (str): folders of images, or LMDBs.
            io_backend (dict): ``type: disk`` (default) or ``type: lmdb``.
            filename_tmpl (str): LQ name for a GT name, without suffix. Default: ``'{}'``.
            meta_info_file (str): file with the GT names to use. Default: all.
            check_pairs (int | 'all'): how many pairs' sizes to check at the start. Default: 1000.
            scale (int), phase ('train', 'val' or 'test'): set by basicsr's option parser.
            gt_size (int): side of the GT patch, a multiple of the scale (train).
            use_hflip, use_rot (bool): random flips and 90-degree rotations (train). Default: true.

    Items:
        ``lq`` float32 (3, h, w) and ``gt`` float32 (3, h * scale, w * scale), RGB in [0, 1]; ``lq_path``, ``gt_path``.
        Where there are `answers` of a teacher, ``teacher``, like gt and cropped and turned as it is (train).

    Raises:
        DataError: wrong options, missing files, pairs that do not fit; on access, an image that cannot be read.
    """

    def __init__(self, opt: Mapping):
        super().__init__()
        for key in ('color', 'mean', 'std'):
            if opt.get(key) is not None:
                raise DataError(f'PairedSRDataset gives RGB in [0, 1] and has no option {key!r}: remove it.')
        self.opt = opt
        self.scale = option(opt, 'scale', int)
        self.train = option(opt, 'phase') == 'train'
        self.gt_size = option(opt, 'gt_size', int) if self.train else None
        if self.train and (self.gt_size < 1 or self.gt_size % self.scale):
            raise DataError(f'gt_size {self.gt_size} is not a positive multiple of the scale {self.scale}.')
        check_pairs = opt.get('check_pairs', 1000)
        if check_pairs != 'all' and (not isinstance(check_pairs, int) or check_pairs < 1):
            raise DataError(f"check_pairs must be a positive number or 'all', but is {check_pairs!r}.")
        self.answers = None  # a teacher's, to the whole images (ppsr.training.teacher.Answers)
        self.pairs = open_pairs(opt)
        check_pair_sizes(self.pairs, self.scale, self.gt_size, None if check_pairs == 'all' else check_pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        lq_path, gt_path = self.pairs.paths(index)
        lq_bytes, gt_bytes = self.pairs.read(index)
        lq, gt = decode_rgb(lq_bytes, lq_path), decode_rgb(gt_bytes, gt_path)
        height, width = lq.shape[0] * self.scale, lq.shape[1] * self.scale
        if not (0 <= gt.shape[0] - height < self.scale and 0 <= gt.shape[1] - width < self.scale):
            raise DataError(
                f'{gt_path} ({gt.shape[0]}x{gt.shape[1]}) is not {self.scale} times {lq_path} '
                f'({lq.shape[0]}x{lq.shape[1]}).'
            )
        gt = gt[:height, :width]
        if self.train:
            if min(height, width) < self.gt_size:
                raise DataError(
                    f'{gt_path} ({height}x{width}) is smaller than the training patch (gt_size {self.gt_size}); lower '
                    'gt_size, or name the images that are large enough in a meta_info_file.'
                )
            images = [gt, self.answers.crop(lq_bytes, (height, width), lq_path)] if self.answers else [gt]
            *images, lq = _cropped(images, lq, self.gt_size, self.scale, gt_path)
            # copies, because augment flips in place
            images = [images[0].copy(), *(np.array(image, np.float32) for image in images[1:]), lq.copy()]
            gt, *answers, lq = augment(images, self.opt.get('use_hflip', True), self.opt.get('use_rot', True))
        item = {'lq': to_tensor(lq)[0], 'gt': to_tensor(gt)[0], 'lq_path': lq_path, 'gt_path': gt_path}
        if self.train and answers:
            item['teacher'] = torch.from_numpy(np.ascontiguousarray(answers[0].transpose(2, 0, 1)))
        return item


def _cropped(images: list[np.ndarray], lq: np.ndarray, gt_size: int, scale: int, gt_path: str) -> list[np.ndarray]:
    """The same random patch of images of GT size and, last, of the LQ image."""
    cropped, lq = paired_random_crop(images, lq, gt_size, scale, gt_path)
    return [*(cropped if isinstance(cropped, list) else [cropped]), lq]  # basicsr unpacks a list of one
