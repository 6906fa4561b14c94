"""One-colour pictures: how their error is measured, and how large it is with each file that is shipped."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ppsr.paper import flatness as module
from ppsr.paper.flatness import COLOURS, flatness
from ppsr.weights import list_pretrained, load_model

WANTED = 2  # levels of 8 bits that a one-colour picture may be off by


@pytest.mark.parametrize('dense', [False, True], ids=['as shipped', 'dense'])
@pytest.mark.parametrize('name', list_pretrained())
def test_shipped_weights_keep_one_colour_pictures(name, dense):
    found = flatness(load_model(name, pure_pass=not dense))
    worst = max((levels, colour, side) for colour, off in found.items() for side, levels in off.items())
    assert worst[0] <= WANTED, f'{name}: {worst[1]} at {worst[2]}×{worst[2]} is off by {worst[0]}'


class Spoils(nn.Module):
    """Enlarges exactly, and spoils one sample of one colour at one size."""

    def forward(self, x):
        y = F.interpolate(x, scale_factor=2.0, mode='nearest')
        if y.shape[-1] == 12:
            y[1, 2, -1, 0] += 7.4 / 255
        return y - 0.3 / 255  # less than half a level: nothing


def test_the_largest_error_of_any_sample_counts():
    colours = {'white': (255, 255, 255), 'grass': (10, 200, 30)}
    assert flatness(Spoils(), colours, (5, 6)) == {'white': {5: 0, 6: 0}, 'grass': {5: 0, 6: 7}}


def test_colours_are_corners_grays_and_pastels():
    values = list(COLOURS.values())
    assert len(set(values)) == 15
    assert sum(set(colour) <= {0, 255} for colour in values) == 8
    assert sum(len(set(colour)) == 1 and set(colour) != {0} and set(colour) != {255} for colour in values) == 3


def test_prints_a_table(tiny_weights, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['flatness', str(tiny_weights)])
    monkeypatch.setattr(module, 'SIDES', (8,))
    module.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ['| colour | 8×8 |', '| --- | ---: |']
    assert len(lines) == 2 + 1 + 15 + 1 + 1
    worst = max(int(line.split('|')[2]) for line in lines[3:-2])
    assert lines[-2] == f'| worst | {worst} |'


@pytest.fixture
def tiny_weights(tmp_path):
    from support import TINY

    from ppsr.archs import PPATDLight
    from ppsr.weights import save_checkpoint

    torch.manual_seed(0)
    save_checkpoint(tmp_path / 'tiny.safetensors', PPATDLight(**TINY).state_dict(), {'type': 'PPATDLight', **TINY})
    return tmp_path / 'tiny.safetensors'
