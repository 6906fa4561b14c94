"""Pictures for tests, and networks whose results are known."""

import numpy as np
from torch import nn

from ppsr.images import write_file


class Repeat(nn.Upsample):
    """A stand-in that repeats every pixel: what comes out is known."""

    def __init__(self, upscale: int = 2):
        super().__init__(scale_factor=upscale)
        self.upscale = upscale


class Blur(nn.Module):
    """A stand-in that looks around: colour bleeds as in a real network."""

    upscale = 2

    def forward(self, x):
        return nn.functional.interpolate(nn.functional.avg_pool2d(x, 5, 1, 2, count_include_pad=False), scale_factor=2)


def noise(*shape, dtype=np.uint8, seed=0):
    values = np.random.default_rng(seed).random(shape)
    return values.astype(dtype) if np.dtype(dtype).kind == 'f' else (values * np.iinfo(dtype).max).astype(dtype)


def repeat(array, factor=2):
    return array.repeat(factor, 0).repeat(factor, 1)


def png(path, pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, noise(6, 5, 3) if pixels is None else pixels)
    return path
