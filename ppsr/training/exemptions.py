"""Training with Pure-Pass in more than one setting, so that one set of weights serves them all: ``train → pp_*``.

For every batch is drawn whether it runs dense, in the paper's setting, or in the network's own, and with which
threshold. The draws are from torch's generator, whose state checkpoints keep: a resumed training draws the same.
"""

import contextlib
from collections.abc import Mapping

import torch
from torch import nn

from ppsr.archs.masked import AS_PUBLISHED, as_masked
from ppsr.errors import UserError

__all__ = ['Exemptions']


class Exemptions:
    """What the batches of a training are exempt from.

    Args:
        train: the options: `pp_probability`, `pp_paper_probability`, `pp_threshold_range`.
        net: the network that is trained, anybody's; without these options it runs as it is.

    Raises:
        UserError: the network has no mask, or its mask no threshold, to follow the options with.
    """

    def __init__(self, train: Mapping, net: nn.Module):
        self.probability = train.get('pp_probability', 1.0)
        self.paper = train.get('pp_paper_probability', 0.0)
        self.thresholds = train.get('pp_threshold_range')
        self.is_drawn = self.probability < 1 or self.paper > 0 or self.thresholds is not None
        self.net = as_masked(net)
        if not self.is_drawn:
            return
        if self.net is None or self.net.pure_pass is None:
            raise UserError(f'train → pp_…: {type(net).__name__} has no mask; leave these options out.')
        self.paper_mask = AS_PUBLISHED.build_mask().to(next(net.parameters()).device)
        if self.thresholds:
            try:
                self.net.pure_pass.with_threshold(self.thresholds[0])
            except ValueError as e:
                raise UserError(f'train → pp_threshold_range: {e}; choose another pp_mask or leave it out.') from e

    def draw(self) -> contextlib.AbstractContextManager:
        """What one step, forward and backward, runs within."""
        if not self.is_drawn:
            return contextlib.nullcontext()
        which, where = torch.rand(2, dtype=torch.float64).tolist()
        if which >= self.probability:
            return self.net.exempting(None)
        if which < self.paper:
            return self.net.exempting(self.paper_mask, AS_PUBLISHED.scope)
        mask = self.net.pure_pass
        if self.thresholds:
            low, high = self.thresholds
            mask = mask.with_threshold(low + where * (high - low))
        return self.net.exempting(mask)
