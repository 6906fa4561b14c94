"""``ppsr purity`` and the shares behind it, against masks drawn by hand."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import shared

from ppsr.cli import main
from ppsr.errors import UserError
from ppsr.masks.pure_pass import PurePass
from ppsr.paper.purity import shares


def speck(height=10, width=10, at=(0, 0)):
    """Gray with one red pixel."""
    x = torch.full((1, 3, height, width), 0.5)
    x[0, :, at[0], at[1]] = torch.tensor([1.0, 0.0, 0.0])
    return x


def test_one_speck():
    # four windows of 5×5; the speck spoils one. The shifted grid has borders at 2 and 7: there it spoils 2×2 pixels
    found = shares(speck())[8, 5]
    assert (found.plain, found.fused) == (0.75, 0.96)


def test_grid_has_every_setting():
    found = shares(speck(), [1, 8], [2, 5])
    assert list(found) == [(1, 2), (1, 5), (8, 2), (8, 5)]
    assert found[1, 5].plain == 1  # one centre: every pixel has the same label
    assert found[8, 2].plain == 0.96  # one of 25 windows is spoiled


def test_shift_is_used():
    assert shares(speck(), shift=0)[8, 5].fused == 0.75
    assert shares(speck(at=(1, 1)), shift=1)[8, 5].fused == 0.75 + 9 / 100  # windows of one row or column at the border
    assert shares(speck(at=(1, 1)), shift=2)[8, 5].fused == 0.75 + 21 / 100


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 7), st.integers(1, 20), st.integers(1, 20))
def test_equals_the_mask_of_the_network_and_fusion_only_adds(seed, k, w, height, width):
    lq = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 0.2 + 0.4
    found = shares(lq, [k], [w])[k, w]
    assert found.plain == PurePass(k, w, fuse=False)(lq).double().mean().item()
    assert found.fused == PurePass(k, w)(lq).double().mean().item()
    assert 0 <= found.plain <= found.fused <= 1


@pytest.mark.parametrize('setting', [dict(num_centers=[0]), dict(windows=[0]), dict(shift=5), dict(shift=-1)])
def test_settings_out_of_range(setting):
    with pytest.raises(UserError):
        shares(speck(), **setting)


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / 'Set0' / 'HR'
    folder.mkdir(parents=True)
    for name, at in (('a', (0, 0)), ('b', (4, 4))):
        lq = (speck(at=at)[0].permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(np.ascontiguousarray(lq)).save(folder / f'{name}.png')
    return folder


def test_command_with_images_that_are_lq(photographs, capsys):
    assert main(['purity', '--data', str(photographs), '--lq', '--format', 'json']) == 0
    found = json.loads(capsys.readouterr().out)['Set0']
    assert found == {
        'a': [{'k': 8, 'w': 5, 'plain': 0.75, 'fused': 0.96}],
        'b': [{'k': 8, 'w': 5, 'plain': 0.75, 'fused': 0.91}],
    }


def test_command_makes_lq_of_hr(photographs, capsys):
    assert main(['purity', '--data', str(photographs.parent), '--scale', '2']) == 0
    out = capsys.readouterr().out
    assert '5×5' in out and 'Set0, K = 8, w = 5, shift 2: 2 images' in out
    assert out.strip().splitlines()[-1].startswith('mean')


def test_command_with_a_grid(photographs, capsys):
    assert main(['purity', '--data', str(photographs), '--lq', '--num-centers', '1', '8', '--format', 'markdown']) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    assert [row.split(' | ')[0] for row in rows[2:]] == ['| 1', '| 8']
    assert '| 8 | 5 | 75.00 |' in rows[-1]


def test_command_with_other_masks(photographs, capsys):
    command = ['purity', '--data', str(photographs), '--lq', '--format', 'json', '--mask']
    assert main([*command, 'variance', '--threshold', '0.02', '2']) == 0
    found = json.loads(capsys.readouterr().out)['Set0']
    # within 5×5 of the speck, inside the image: 3×3 of the corner, 5×5 around (4, 4)
    assert list(found['a'].values()) == [0.91, 1.0] and list(found['b'].values()) == [0.75, 1.0]
    for mask in (['dynamic', '--num-centers', '2'], ['both', '--threshold', '0.02']):
        assert main([*command, *mask]) == 0
        shares_of = json.loads(capsys.readouterr().out)['Set0']
        assert all(0 < share < 1 for image in shares_of.values() for share in image.values())
    assert main([*command[:4], '--mask', 'variance']) == 0
    assert 'variance' in capsys.readouterr().out


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--threshold', '0.1'], 'belongs to the masks gradient'),
        (['--mask', 'variance', '--threshold', '0'], '--threshold'),
        (['--mask', 'variance', '--num-centers', '4'], 'num_centers'),
        (['--mask', 'flat'], "'flat' is not a registered mask"),
    ],
    ids=['colour', 'range', 'not its own', 'unknown'],
)
def test_what_a_mask_does_not_take(photographs, capsys, arguments, message):
    assert main(['purity', '--data', str(photographs), '--lq', *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize('arguments', [['--scale', '0'], ['--scale', '40'], ['--window', '0'], ['--shift', '9']])
def test_bad_arguments(photographs, capsys, arguments):
    assert main(['purity', '--data', str(photographs), *arguments]) == 2
    assert capsys.readouterr().err.startswith('ppsr: error: ')


def test_set14_share_is_near_the_calibration(capsys):
    """METHOD: on Set14 ×4 fusion raises the share by about the published factor."""
    folder = shared('data', 'Set14', 'HR')
    assert main(['purity', '--data', str(folder), '--format', 'json']) == 0
    images = json.loads(capsys.readouterr().out)['Set14']
    assert len(images) == 14
    plain, fused = (sum(image[0][kind] for image in images.values()) / 14 for kind in ('plain', 'fused'))
    assert 0.25 < plain < fused < 0.45
