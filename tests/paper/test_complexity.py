"""Multiply-adds: agreement with torch's counter on what is executed, hand-computed values, and ``ppsr complexity``."""

import json

import numpy as np
import pytest
import torch
import yaml
from flop_counter import flop_counter
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from ppsr.archs import ATDLight, ATDLightV2, CAMixerATDLight, PPATDLight, PPATDLightV2
from ppsr.cli import main
from ppsr.errors import UserError
from ppsr.ops.category_attention import COMPENSATIONS
from ppsr.paper import complexity

SIZES = [(21, 27), (8, 8), (1, 40)]


def executed(net, x):
    """Multiply-adds that torch counts in a forward pass, and the mask used. The counter knows no fused attention of
    the CPU, so torch's own attention (CAMixer) runs as two matrix products. What follows from the weights alone is
    computed in a pass before."""
    with torch.no_grad():
        net.eval()(x)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        _, mask = net.eval()(x, return_mask=True)
    return counter.get_total_flops() / 2, mask


def half_flat(height, width):
    """Two images: noise with a flat left half, and noise alone: different numbers of pure pixels."""
    x = torch.rand(2, 3, height, width)
    x[0, :, :, : width // 2 + 1] = 0.3
    return x


@pytest.mark.parametrize('arch', [ATDLight, ATDLightV2])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_dense_agrees_with_the_counter(tiny, size, arch):
    net = arch(**tiny)
    counted, mask = executed(net, torch.rand(2, 3, *size))
    assert mask is None
    assert 2 * sum(net.macs(*size).values()) == counted


@pytest.mark.parametrize('arch', [PPATDLight, PPATDLightV2])
@pytest.mark.parametrize('compensation', COMPENSATIONS)
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_masked_agrees_with_the_counter(tiny, compensation, size, arch):
    net = arch(**tiny, pp_compensation=compensation)
    counted, mask = executed(net, half_flat(*size))
    assert mask.any() and not mask.all()
    macs = net.macs(*size, mask)
    assert sum(macs.values()) == counted
    assert macs['category'] < 2 * net.macs(*size)['category']


@pytest.mark.parametrize('arch', [PPATDLight, PPATDLightV2])
@pytest.mark.parametrize('compensation', COMPENSATIONS)
def test_all_pure_agrees_with_the_counter(tiny, compensation, arch):
    net = arch(**tiny, pp_compensation=compensation)
    counted, mask = executed(net, torch.full((1, 3, 10, 10), 0.5))
    assert mask.all()
    macs = net.macs(10, 10, mask)
    assert sum(macs.values()) == counted
    projections = 4 * 256 * 16 * 16  # 4 layers, 16·16 padded pixels
    assert macs['category'] == (projections if compensation == 'value' else 0)


@pytest.mark.parametrize('ratio', [0, 0.3, 0.5, 1])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_camixer_agrees_with_the_counter(tiny, ratio, size):
    net = CAMixerATDLight(**tiny, camixer_ratio=ratio)
    counted, _ = executed(net, torch.rand(2, 3, *size))
    assert 2 * sum(net.macs(*size).values()) == counted


def test_published_network_per_token_and_at_the_protocol():
    """The figures of docs/flops.md: multiply-adds per token and layer, derived by hand."""
    net = ATDLight(upscale=4)
    tokens = 320 * 192  # 180 rows padded to 192
    macs = net.macs(180, 320)
    assert macs['qkv'] == 24 * tokens * 6912
    assert macs['window'] == 24 * tokens * (24576 + 2304)
    assert macs['category'] == 24 * tokens * (12288 + 2304)
    assert macs['ffn'] == 24 * tokens * 6960
    refinement, per_entry = 20 * tokens * 64 * 48, 24 * 64 * 48 * (8 + 48)
    assert macs['dictionary'] == 24 * tokens * 3968 + refinement + per_entry
    assert complexity.static_size(4) == (180, 320)
    assert round(sum(macs.values()) / 1e9, 2) == 98.96


def test_the_second_version_per_token():
    """As above, for the network of 2026."""
    tokens = 320 * 192
    macs = ATDLightV2().macs(180, 320)
    assert macs['qkv'] == 24 * tokens * 6912
    assert macs['window'] == 24 * tokens * (24576 + 2304)
    assert macs['category'] == 24 * tokens * (12288 + 2304)
    assert macs['dictionary'] == 24 * tokens * (48 * 12 + 12 * 128 + 128 * 48)
    assert macs['ffn'] == 24 * tokens * (48 * 48 + 49 * 52 + 52 * 48)
    assert round(sum(macs.values()) / 1e9, 2) == 102.08


def test_mask_without_a_forward_pass_is_the_one_used(tiny):
    net, x = PPATDLight(**tiny).eval(), half_flat(21, 27)
    with torch.no_grad():
        _, used = net(x, return_mask=True)
    assert torch.equal(net.mask_of(x), used)


def test_cost_of_an_image(tiny):
    net = PPATDLight(**tiny)
    cost = complexity.image_cost(net, half_flat(16, 16)[:1], 'half')
    assert cost.size == (16, 16) and 0.3 < cost.pure < 0.7
    assert cost.total == sum(cost.macs.values()) < cost.dense
    assert cost.saved == pytest.approx(1 - cost.total / cost.dense)
    assert cost.dense == sum(ATDLight(**tiny).macs(16, 16).values())
    noise = complexity.image_cost(net, torch.rand(1, 3, 16, 16))
    assert noise.saved < 0.01


def test_saving_is_bounded_and_reaches_the_bound(tiny):
    net = PPATDLight(**tiny)
    bound = complexity.largest_saving(net, 16, 16)
    assert complexity.image_cost(net, torch.zeros(1, 3, 16, 16)).saved == pytest.approx(bound)
    assert complexity.image_cost(net, half_flat(16, 16)[:1]).saved < bound
    assert complexity.largest_saving(ATDLight(**tiny), 16, 16) == 0
    assert complexity.largest_saving(CAMixerATDLight(**tiny), 16, 16) == 0


def test_spread():
    assert complexity.spread([1.0, 2.0, 6.0, 3.0]) == {'mean': 3.0, 'min': 1.0, 'median': 2.5, 'max': 6.0}


@pytest.fixture
def options(tmp_path, tiny):
    path = tmp_path / 'options.yml'
    path.write_text(yaml.safe_dump({'network_g': {'type': 'PPATDLight', **tiny}}))
    return path


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / 'photographs'
    folder.mkdir()
    random = np.random.default_rng(0)
    noise = random.integers(0, 255, (32, 40, 3), dtype=np.uint8)
    noise[:, :20] = 90
    Image.fromarray(noise).save(folder / 'half.png')
    Image.fromarray(np.full((33, 25, 3), 70, np.uint8)).save(folder / 'flat.png')
    return folder


def test_command_as_json(options, photographs, tiny, capsys):
    command = ['complexity', '-opt', str(options), '--input-size', '3', '20', '30', '--data', str(photographs)]
    assert main([*command, '--format', 'json']) == 0
    told = json.loads(capsys.readouterr().out)
    net = PPATDLight(**tiny)
    assert told['parameters'] == complexity.count_parameters(net)
    assert told['static']['input'] == [3, 20, 30]
    mask = 24 * 32 * 3 * 8  # padded pixels, channels, centres
    assert told['static']['parts']['mask'] == mask
    assert told['static']['macs'] == sum(told['static']['parts'].values()) == sum(net.macs(20, 30).values()) + mask
    data = told['dynamic']['photographs']
    flat, half = data['per_image']  # by name
    assert flat['input'] == [3, 16, 12] and flat['pure'] == 1
    assert half['input'] == [3, 16, 20] and 0 < half['pure'] < 1
    assert data['macs']['mean'] == (flat['macs'] + half['macs']) / 2
    assert data['saved']['max'] == flat['saved'] > half['saved'] > 0


@pytest.mark.parametrize('form', ['text', 'markdown'])
def test_command_as_a_table(options, photographs, capsys, form):
    assert main(['complexity', '-opt', str(options), '--data', str(photographs), '--format', form]) == 0
    out = capsys.readouterr().out
    assert '640×360 → 1280×720' in out.replace(' pixels', '') and 'dictionary' in out
    assert 'photographs: 2 images' in out and 'saved (%)' in out


def test_images_that_are_lq_already(options, photographs, capsys):
    assert main(['complexity', '-opt', str(options), '--data', str(photographs), '--lq', '--format', 'json']) == 0
    images = json.loads(capsys.readouterr().out)['dynamic']['photographs']['per_image']
    assert [image['input'] for image in images] == [[3, 33, 25], [3, 32, 40]]


@pytest.mark.parametrize(
    ('network', 'named'),
    [
        ({'type': 'Unheard'}, 'Unheard'),
        ({'type': 'PPATDLight', 'colour': 3}, 'colour'),
        ({'type': 'PPATDLight', 'embed_dim': 7}, 'embed_dim'),
        ({'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3}, 'EDSR'),
        (None, 'network_g'),
    ],
    ids=['type', 'argument', 'value', 'uncounted', 'missing'],
)
def test_a_network_that_cannot_be_is_named(tmp_path, capsys, network, named):
    path = tmp_path / 'options.yml'
    path.write_text(yaml.safe_dump({'network_g': network}))
    assert main(['complexity', '-opt', str(path)]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize('arguments', [['--input-size', '3', '0', '5'], ['--data', 'nowhere']])
def test_bad_arguments(options, capsys, arguments):
    assert main(['complexity', '-opt', str(options), *arguments]) == 2
    assert arguments[-1] in capsys.readouterr().err


def test_build_from_options_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r'nothing\.yml'):
        complexity.build_from_options(tmp_path / 'nothing.yml')
