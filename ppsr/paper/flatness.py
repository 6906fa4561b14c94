"""What weights make of one-colour pictures, which hold nothing to enlarge: by how much their colours are off.

    python -m ppsr.paper.flatness [WEIGHTS …]

prints a table for each weight file (default: those that are shipped).
"""

import argparse
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ppsr.errors import UserError
from ppsr.weights import list_pretrained, load_model

__all__ = ['COLOURS', 'SIDES', 'flatness']

# the corners of the colour cube, three grays and four pastels, as 8-bit RGB
COLOURS = {
    'black': (0, 0, 0),
    'blue': (0, 0, 255),
    'green': (0, 255, 0),
    'cyan': (0, 255, 255),
    'red': (255, 0, 0),
    'magenta': (255, 0, 255),
    'yellow': (255, 255, 0),
    'white': (255, 255, 255),
    'dark gray': (64, 64, 64),
    'gray': (128, 128, 128),
    'light gray': (192, 192, 192),
    'pink': (255, 209, 220),
    'cream': (253, 253, 200),
    'mint': (189, 236, 182),
    'lavender': (200, 191, 231),
}
SIDES = (16, 48)


@torch.no_grad()
def flatness(
    net: nn.Module, colours: Mapping[str, Sequence[int]] = COLOURS, sides: Sequence[int] = SIDES
) -> dict[str, dict[int, int]]:
    """The largest error of any sample of any pixel of one-colour pictures, in levels of 8 bits.

    Args:
        net: (B, 3, h, w) RGB in [0, 1] -> (B, 3, H, W), in eval mode.
        colours: 8-bit RGB by name.
        sides: of the square LR pictures, in pixels.

    Returns:
        {colour: {side: levels}}; the enlarged pictures are rounded to 8 bits, as they are saved.
    """
    device = next((p.device for p in net.parameters()), torch.device('cpu'))
    values = torch.tensor(list(colours.values()), dtype=torch.float32, device=device)[:, :, None, None]
    found = {name: {} for name in colours}
    for side in sides:
        output = net((values / 255).repeat(1, 1, side, side))
        off = ((output.clamp(0, 1) * 255).round() - values).abs().amax((1, 2, 3))
        for name, levels in zip(colours, off.tolist()):
            found[name][side] = int(levels)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('weights', nargs='*', metavar='WEIGHTS', help='names or files (default: all that are shipped)')
    names = parser.parse_args().weights or list(list_pretrained())
    try:
        nets = [load_model(name) for name in names]
    except UserError as e:
        parser.error(str(e))
    for name, net in zip(names, nets):
        found = flatness(net, sides=SIDES)
        rows = [(colour, *off.values()) for colour, off in found.items()]
        rows.append(('worst', *(max(off[side] for off in found.values()) for side in SIDES)))
        print(f'{name}: off by at most, in levels of 8 bits')
        print('| colour | ' + ' | '.join(f'{side}×{side}' for side in SIDES) + ' |\n| --- |' + ' ---: |' * len(SIDES))
        print('\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in rows) + '\n')


if __name__ == '__main__':
    main()
