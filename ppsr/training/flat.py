"""One-colour pictures as a term of the training loss: what has one colour has to keep it.

Photographs hold no pure colours, so that a network which has only seen them changes those, most of all in the corners
of a picture. ``train → flat_opt`` runs a few small one-colour pictures through the network in every step, beside the
batch, and adds their error to the loss (``l_flat`` in the log).
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ppsr.data.synthetic_graphics import draw_colour

__all__ = ['flat_loss', 'flat_pictures']

STREAM = 0xF1A7  # keeps these random numbers apart from the data's


def flat_pictures(options: Mapping, seed: int, iteration: int, rank: int = 0) -> Tensor:
    """The one-colour pictures of a step. They follow from the arguments alone: a resumed training sees the same.

    Args:
        options: ``sides``, the least and the largest side in pixels, and ``pixels``, of all pictures together: many
            small ones, or one where a picture has more. The size is the same in every process.
        seed, iteration, rank: of the training, of the step, of the process.

    Returns:
        float32 (B, 3, h, w), RGB in [0, 1], in the colours of :func:`ppsr.data.synthetic_graphics.draw_colour`.
    """
    least, largest = options['sides']
    h, w = np.random.default_rng((seed, iteration, STREAM)).integers(least, largest + 1, 2).tolist()
    rng = np.random.default_rng((seed, iteration, STREAM, rank))
    colours = np.stack([draw_colour(rng) for _ in range(max(1, options['pixels'] // (h * w)))])
    return (torch.from_numpy(colours).float() / 255)[:, :, None, None].repeat(1, 1, h, w)


def flat_loss(output: Tensor, pictures: Tensor, options: Mapping) -> Tensor:
    """Error of one-colour pictures: mean of |e| + square_weight·e², times loss_weight.

    The square is what counts for the few pixels that are far off, those of the corners.

    Args:
        output: (B, 3, H, W), what the network made of the pictures.
        pictures: (B, 3, h, w), each of one colour.
        options: ``loss_weight``, ``square_weight``.

    Returns:
        A scalar.
    """
    error = output.float() - pictures[..., :1, :1]
    return options['loss_weight'] * (error.abs() + options['square_weight'] * error.square()).mean()
