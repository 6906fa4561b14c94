"""Parameters and multiply-adds of a network: by part, for one size or over the images of a data set.

The convention is that of docs/flops.md: multiply-adds of every matrix product and convolution that the network
executes on its padded input; the static figure is for a 1280×720 output.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor, nn

from ppsr.archs import MaskedNetwork
from ppsr.archs.build import build_masked
from ppsr.errors import UserError
from ppsr.paper.report import Table
from ppsr.training.options import read_yaml

__all__ = [
    'ImageCost',
    'as_dict',
    'build_from_options',
    'count_parameters',
    'dense_macs',
    'dynamic_table',
    'image_cost',
    'largest_saving',
    'spread',
    'static_size',
    'static_table',
    'uniform_macs',
]

STATIC_OUTPUT = (720, 1280)


def build_from_options(path: str | Path) -> MaskedNetwork:
    """The network of an options file (:func:`ppsr.archs.build.build_masked`); nothing else in the file is looked at.

    Raises:
        UserError: the file cannot be read or names no network.
    """
    network = read_yaml(path).get('network_g')
    if not isinstance(network, dict):
        raise UserError(f'options file {path} lacks network_g.')
    return build_masked(network, f'options file {path}: network_g')


def count_parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def static_size(scale: int) -> tuple[int, int]:
    """(height, width) of the LQ image whose enlargement is 1280×720."""
    return STATIC_OUTPUT[0] // scale, STATIC_OUTPUT[1] // scale


def dense_macs(net: MaskedNetwork, height: int, width: int) -> int:
    """Multiply-adds of one image without Pure-Pass: no token exempt, no mask computed."""
    return sum(net.macs(height, width).values())


def uniform_macs(net: MaskedNetwork, height: int, width: int, pure: bool) -> dict[str, int]:
    """Multiply-adds by part, the mask's own included, when no pixel or every pixel is pure: the two ends."""
    if net.pure_pass is None:
        return net.macs(height, width)
    return net.macs(height, width, torch.full((1, *net.padded_size(height, width)), pure))


def largest_saving(net: MaskedNetwork, height: int, width: int) -> float:
    """Share of the dense multiply-adds that is saved when every pixel is pure, in [0, 1]: the bound."""
    return 1 - sum(uniform_macs(net, height, width, True).values()) / dense_macs(net, height, width)


@dataclass(frozen=True)
class ImageCost:
    """What one image costs.

    Attributes:
        name: of the image.
        size: (height, width) of the LQ image.
        pure: share of its pixels that are pure, in [0, 1].
        exempt: share of the tokens of the padded image that are: what the saving follows.
        macs: multiply-adds by part.
        dense: multiply-adds without Pure-Pass.
    """

    name: str
    size: tuple[int, int]
    pure: float
    exempt: float
    macs: dict[str, int]
    dense: int

    @property
    def total(self) -> int:
        return sum(self.macs.values())

    @property
    def saved(self) -> float:
        """Share of the dense multiply-adds, in [0, 1]."""
        return 1 - self.total / self.dense


def image_cost(net: MaskedNetwork, lq: Tensor, name: str = '') -> ImageCost:
    """Cost of one image (1, 3, H, W) with the mask that the network really uses for it."""
    h, w = lq.shape[-2:]
    mask = net.mask_of(lq)
    pure, exempt = (0.0, 0.0) if mask is None else (m.double().mean().item() for m in (mask[..., :h, :w], mask))
    return ImageCost(name, (h, w), pure, exempt, net.macs(h, w, mask), dense_macs(net, h, w))


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean, minimum, median and maximum."""
    values = list(values)
    return {'mean': mean(values), 'min': min(values), 'median': median(values), 'max': max(values)}


def static_table(net: MaskedNetwork, height: int, width: int) -> Table:
    """GMACs by part for an image of height × width LQ pixels, when no pixel and when every pixel is pure."""
    none, every = (uniform_macs(net, height, width, pure) for pure in (False, True))
    total, scale = sum(none.values()), net.upscale
    rows = [[part, none[part] / 1e9, 100 * none[part] / total, every[part] / 1e9] for part in none]
    rows.append(['total', total / 1e9, 100.0, sum(every.values()) / 1e9])
    table = Table(
        ['part', 'GMACs', 'share (%)', 'GMACs, all pure'],
        rows,
        ['', '.3f', '.1f', '.3f'],
        f'{type(net).__name__} ×{scale}: {count_parameters(net):,} parameters; one image of {width}×{height} pixels '
        f'→ {width * scale}×{height * scale}',
    )
    bound = largest_saving(net, height, width)
    if bound > 0:
        table.notes = [f'Bound of the saving (every pixel pure): {100 * bound:.2f} % of the dense network.']
    return table


def dynamic_table(name: str, costs: list[ImageCost]) -> Table:
    """Mean, minimum, median and maximum over the images of a data set."""
    lines = {
        'pure pixels (%)': [100 * cost.pure for cost in costs],
        'GMACs': [cost.total / 1e9 for cost in costs],
        'GMACs, dense': [cost.dense / 1e9 for cost in costs],
        'saved (%)': [100 * cost.saved for cost in costs],
    }
    rows = [[line, *spread(values).values()] for line, values in lines.items()]
    total = 1 - sum(cost.total for cost in costs) / sum(cost.dense for cost in costs)
    return Table(
        ['per image', 'mean', 'min', 'median', 'max'],
        rows,
        ['', *['.3f'] * 4],
        f'{name}: {len(costs)} images, each at its own size',
        [f'Saved of the multiply-adds of all images together: {100 * total:.2f} %.'],
    )


def as_dict(net: MaskedNetwork, height: int, width: int, costs: dict[str, list[ImageCost]]) -> dict:
    """All of it for a program: exact multiply-adds, shares in [0, 1]."""
    parts = uniform_macs(net, height, width, False)
    return {
        'arch': type(net).__name__,
        'scale': net.upscale,
        'parameters': count_parameters(net),
        'static': {
            'input': [3, height, width],
            'macs': sum(parts.values()),
            'parts': parts,
            'largest_saving': largest_saving(net, height, width),
        },
        'dynamic': {
            name: {
                'images': len(images),
                'pure': spread(cost.pure for cost in images),
                'macs': spread(cost.total for cost in images),
                'dense_macs': spread(cost.dense for cost in images),
                'saved': spread(cost.saved for cost in images),
                'parts': {part: mean(cost.macs[part] for cost in images) for part in images[0].macs},
                'per_image': [
                    {
                        'name': cost.name,
                        'input': [3, *cost.size],
                        'pure': cost.pure,
                        'macs': cost.total,
                        'saved': cost.saved,
                    }
                    for cost in images
                ],
            }
            for name, images in costs.items()
        },
    }
