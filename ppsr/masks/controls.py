"""Controls: masks that exempt exactly as many pixels of each image as another mask, but other pixels."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ppsr.masks.base import PixelMask, build_mask, register_mask
from ppsr.masks.gradient import local_gradient
from ppsr.masks.variance import local_variance

__all__ = ['SCORES', 'SameShare']


def chance(lq: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, H, W): random numbers that depend on the size of the images only."""
    score = torch.rand(1, *lq.shape[2:], generator=torch.Generator().manual_seed(0))
    return score.expand(lq.shape[0], -1, -1).to(lq.device)


SCORES = {'gradient': local_gradient, 'variance': local_variance, 'random': chance}


@register_mask('same_share')
class SameShare(PixelMask):
    """Of each image exactly as many pixels as another mask finds, but those with the lowest score.

    Args:
        score: name in :data:`SCORES`; ties go to the first pixel.
        of: the mask that says how many, as :func:`ppsr.masks.build_mask` takes it.
        **settings: of that mask.

    Raises:
        ValueError: a score or a mask that does not exist.
    """

    def __init__(self, score: str = 'variance', of: str | Mapping = 'colour', **settings):
        super().__init__()
        if score not in SCORES:
            raise ValueError(f'{score!r} is not a score; those there are {", ".join(SCORES)}.')
        self.score, self.of = score, build_mask(of, **settings)

    def forward(self, lq: Tensor) -> Tensor:
        counts = self.of(lq).flatten(1).sum(1)
        score = SCORES[self.score](lq)
        place = score.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
        return (place < counts[:, None]).view_as(score)

    def macs(self, height: int, width: int) -> int:
        """As for the other mask, so that networks are compared at equal cost."""
        return self.of.macs(height, width)

    def extra_repr(self) -> str:
        return f'score={self.score!r}'
