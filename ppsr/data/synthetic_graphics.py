"""Drawings made on the fly from a seed: what photographs hold nothing of, and screens, logos and diagrams are made of.

A network that has only seen photographs changes pure colours, most of all along the borders of a picture and where they
are saturated. A small share of batches from here teaches it to leave them alone: ``synthetic_graphics: 0.12`` in the
options of any training set makes 12 % of its batches of drawings (:class:`ppsr.training.loader.TrainBatches`).

Every drawing is a whole picture, borders included; its LR is made by the exact bicubic.
"""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import torch
from basicsr.utils.registry import DATASET_REGISTRY
from torch.utils import data

from ppsr.data.bicubic import imresize_bicubic
from ppsr.data.pairs import option
from ppsr.errors import DataError
from ppsr.images import to_tensor
from ppsr.registry import register

__all__ = ['SyntheticGraphics', 'draw_colour', 'draw_graphics', 'graphics_batch', 'graphics_shape']

FLAT = 0.5  # share of pictures of a single colour
SUPERSAMPLING = 4  # anti-aliased drawings are drawn so many times larger and averaged
FONTS = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_PLAIN,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_SCRIPT_SIMPLEX,
)
LETTERS = np.array(list('ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 .,:;!?+-=/()%&#'))


def draw_graphics(seed: int, height: int, width: int) -> np.ndarray:
    """A drawing: one colour all over, or shapes, lines and text on a flat or graded ground.

    Args:
        seed: non-negative; equal seeds and sizes give equal drawings.
        height, width: in pixels, at least 1.

    Returns:
        uint8 (height, width, 3).
    """
    rng = np.random.default_rng(seed)
    if rng.random() < FLAT:
        return np.tile(draw_colour(rng), (height, width, 1))
    smooth = rng.random() < 0.8  # the others have hard edges, as pixel graphics and screens have
    factor = SUPERSAMPLING if smooth else 1
    canvas = _ground(rng, height * factor, width * factor)
    palette = [draw_colour(rng) for _ in range(rng.integers(2, 6))]
    for _ in range(rng.integers(1, 13)):
        colour = tuple(int(c) for c in palette[rng.integers(len(palette))])
        DRAW[rng.integers(len(DRAW))](rng, canvas, colour, factor)
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA) if smooth else canvas


def draw_colour(rng: np.random.Generator) -> np.ndarray:
    """uint8 (3,): a corner or an edge of the colour cube, a gray, a pastel, or any colour."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(np.array([0, 255], np.uint8), 3)
    if kind < 0.6:
        colour = rng.choice(np.array([0, 255], np.uint8), 3)
        colour[rng.integers(3)] = rng.integers(256)
        return colour
    if kind < 0.7:
        return np.full(3, rng.integers(256), np.uint8)
    return rng.integers(160 if kind < 0.8 else 0, 256, 3).astype(np.uint8)


def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A flat ground, or a linear or radial gradient between two colours."""
    first = draw_colour(rng)
    kind = rng.random()
    if kind < 0.6:
        return np.tile(first, (height, width, 1))
    y, x = np.mgrid[:height, :width] / max(height, width)
    if kind < 0.85:
        angle = rng.random() * 2 * np.pi
        t = x * np.cos(angle) + y * np.sin(angle)
    else:
        t = np.hypot(x - rng.random(), y - rng.random())
    t = (t - t.min()) / max(np.ptp(t), 1e-9)
    return np.round(first + t[..., None] * (draw_colour(rng).astype(float) - first)).astype(np.uint8)


def _point(rng: np.random.Generator, canvas: np.ndarray) -> tuple[int, int]:
    """A point of the canvas or a little outside, (x, y)."""
    height, width = canvas.shape[:2]
    return int(rng.uniform(-0.1, 1.1) * width), int(rng.uniform(-0.1, 1.1) * height)


def _thickness(rng: np.random.Generator, factor: int) -> int:
    return max(1, int(factor * rng.choice([1, 1, 2, 3, 4, 8])))


def _rectangle(rng, canvas, colour, factor):
    filled = rng.random() < 0.7
    cv2.rectangle(canvas, _point(rng, canvas), _point(rng, canvas), colour, -1 if filled else _thickness(rng, factor))


def _ellipse(rng, canvas, colour, factor):
    axes = tuple(int(a) for a in rng.uniform(0.02, 0.5, 2) * max(canvas.shape[:2]))
    thickness = -1 if rng.random() < 0.7 else _thickness(rng, factor)
    cv2.ellipse(canvas, _point(rng, canvas), axes, rng.uniform(0, 180), 0, 360, colour, thickness)


def _polygon(rng, canvas, colour, factor):
    points = np.array([_point(rng, canvas) for _ in range(rng.integers(3, 7))], np.int32)
    cv2.fillPoly(canvas, [points], colour)


def _lines(rng, canvas, colour, factor):
    """One to six parallel lines."""
    start, end = np.array(_point(rng, canvas)), np.array(_point(rng, canvas))
    step, thickness = rng.integers(-12, 13, 2) * factor, _thickness(rng, factor)
    for i in range(rng.integers(1, 7)):
        first, last = (tuple(int(c) for c in point + i * step) for point in (start, end))
        cv2.line(canvas, first, last, colour, thickness)


def _text(rng, canvas, colour, factor):
    text = ''.join(rng.choice(LETTERS, rng.integers(1, 13)))
    font, size = FONTS[rng.integers(len(FONTS))], rng.uniform(0.4, 2.0) * factor
    cv2.putText(canvas, text, _point(rng, canvas), font, size, colour, max(1, int(size * rng.uniform(1, 2.5))))


DRAW = (_rectangle, _ellipse, _polygon, _lines, _text, _text)


@register(DATASET_REGISTRY)
class SyntheticGraphics(data.Dataset):
    """Pairs of a drawing and its exact bicubic LR image, float RGB in [0, 1], made when they are asked for.

    Args:
        opt: options of the data set.

            gt_size (int): side of the HR pictures, a multiple of the scale.
            length (int): how many pictures there are. Default: 10000.
            seed (int): of the whole set. Default: 0. Item i depends on (seed, i) and the size alone.
            scale (int): set by the option parser.

    Items:
        ``lq`` float32 (3, h, w) and ``gt`` float32 (3, h·scale, w·scale), RGB in [0, 1]; ``lq_path`` and ``gt_path``
        say which drawing it is.

    Raises:
        DataError: wrong options.
    """

    def __init__(self, opt: Mapping):
        super().__init__()
        self.opt = opt
        self.scale, self.size = option(opt, 'scale', int), option(opt, 'gt_size', int)
        if self.size < 1 or self.size % self.scale:
            raise DataError(f'gt_size {self.size} is not a positive multiple of the scale {self.scale}.')
        values = {'length': 10000, 'seed': 0} | {
            key: opt[key] for key in ('length', 'seed') if opt.get(key) is not None
        }
        for key, least in (('length', 1), ('seed', 0)):
            if type(values[key]) is not int or values[key] < least:
                raise DataError(
                    f'{key} of data set {opt.get("name")!r} must be a whole number of at least {least}, '
                    f'but is {values[key]!r}.'
                )
        self.length, self.seed = values['length'], values['seed']

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(index)
        seed = int(np.random.SeedSequence((self.seed, index)).generate_state(1)[0])
        lq, gt = _pair(seed, self.scale, self.size)
        name = f'drawing {seed}'
        return {'lq': lq, 'gt': gt, 'lq_path': name, 'gt_path': name}


def graphics_shape(rng: np.random.Generator, scale: int, gt_size: int, batch: int) -> tuple[int, int]:
    """How drawings stand in for a batch of `batch` training patches: number of pictures, side of an HR picture.

    Either so many of that size, or twice as many of half the side, or four times as many of a quarter, which is the
    most likely: borders are what has to be learned, and small pictures have most of them and cost least. No LR side is
    less than 8 pixels.
    """
    halvings = int(rng.choice(3, p=(0.2, 0.3, 0.5)))
    while halvings and gt_size >> halvings < 8 * scale:
        halvings -= 1
    return batch << halvings, (gt_size >> halvings) // scale * scale


def graphics_batch(seeds: Sequence[int], scale: int, gt_size: int) -> dict:
    """Drawings of these seeds as a batch of a training set.

    Returns:
        ``lq`` float32 (B, 3, h, w) and ``gt`` float32 (B, 3, h·scale, w·scale), RGB in [0, 1]; ``lq_path`` and
        ``gt_path``, lists that say which drawings they are.
    """
    pairs = [_pair(seed, scale, gt_size) for seed in seeds]
    names = [f'drawing {seed}' for seed in seeds]
    lq, gt = (torch.stack(images) for images in zip(*pairs))
    return {'lq': lq, 'gt': gt, 'lq_path': names, 'gt_path': names}


def _pair(seed: int, scale: int, gt_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    gt = draw_graphics(seed, gt_size, gt_size)
    return to_tensor(imresize_bicubic(gt, scale))[0], to_tensor(gt)[0]
