"""The stand-in for window attention in closed form: any weights get window exemption, without training.

Given its inputs, a layer's stand-in A z + B mean5(z) + c is linear in A, B and c: the best ones, in the mean squared
error against what window attention gives, solve a system of 2·C + 1 equations. Each layer is fitted when its turn comes
in one forward pass of all crops, so that it sees what the layers before it, already compensated, hand on.
"""

from functools import partial

import torch
from torch import Tensor

from ppsr.archs.masked import MaskedNetwork
from ppsr.archs.window_compensation import ExemptingLayer, mean5
from ppsr.masks import PixelMask

__all__ = ['fit_stand_ins']

ROWS = 1 << 16  # tokens that are added to the equations at a time
FEW = 4  # times the unknowns: with fewer pure tokens than that all tokens are fitted to


def fit_stand_ins(net: MaskedNetwork, lq: Tensor, mask: PixelMask, ridge: float = 1e-6) -> None:
    """Set the stand-in of every layer to the one with the least mean squared error over the pure tokens of `lq`.

    Args:
        net: with a learned stand-in for window attention, in eval mode.
        lq: (B, 3, h, w) RGB in [0, 1] on the network's device, both sides multiples of what the network pads to.
        mask: finds the tokens that are pure, for the fit and for the layers before.
        ridge: added to the diagonal of the equations, times its mean.

    Raises:
        ValueError: other sides.
    """
    if net.padded_size(*lq.shape[-2:]) != tuple(lq.shape[-2:]):
        raise ValueError(f'a stand-in is fitted to whole windows, not to images of {tuple(lq.shape[-2:])}')
    layers, pure = net.exempting_layers(), mask(lq)
    handles = [layer.register_forward_pre_hook(partial(_fit, pure=pure, ridge=ridge)) for layer in layers]
    try:
        with torch.no_grad(), net.exempting(mask, net.scopes):
            net(lq)
    finally:
        for handle in handles:
            handle.remove()


def _fit(layer: ExemptingLayer, inputs: tuple, pure: Tensor, ridge: float) -> None:
    """What happens before a layer runs: its stand-in becomes the best for the map that it is given."""
    z, attention = layer.window_example(inputs[0])
    unknowns = 2 * z.shape[-1] + 1
    keep = pure if pure.sum() >= FEW * unknowns else torch.ones_like(pure)
    rows, right = torch.cat([z, mean5(z)], -1)[keep], attention[keep]
    gram = torch.zeros(unknowns, unknowns, dtype=torch.float64, device=z.device)
    product = torch.zeros(unknowns, z.shape[-1], dtype=torch.float64, device=z.device)
    for a, b in zip(rows.split(ROWS), right.split(ROWS)):
        a = torch.cat([a.double(), a.new_ones(len(a), 1, dtype=torch.float64)], 1)
        gram += a.T @ a
        product += a.T @ b.double()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, product).to(layer.comp.weight.dtype)
    layer.comp.weight.copy_(solution[:-1].T)
    layer.comp.bias.copy_(solution[-1])
