"""An upsampler in closed form: it is the best one, and finds one that is there."""

import pytest
import torch
from support import TINY

from ppsr.archs import PPATDLight
from ppsr.training.upsampler import fit_upsampler, with_scale


def images(count: int):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(1, 3, 16, 16, generator=generator) for _ in range(count)]


def test_finds_the_upsampler_that_made_the_pairs():
    torch.manual_seed(0)
    net = PPATDLight(**TINY).eval()
    with torch.no_grad():
        pairs = [(lq, net(lq)) for lq in images(6)]
        kept = {name: value.clone() for name, value in net.state_dict().items()}
        net.upsample[0].weight.zero_()
        fit_upsampler(net, pairs, ridge=1e-12)
        for lq, gt in pairs:
            torch.testing.assert_close(net(lq), gt, atol=1e-3, rtol=0)
    for name, value in net.state_dict().items():
        assert name.startswith('upsample.') or torch.equal(value, kept[name]), name


def test_no_other_upsampler_is_better():
    torch.manual_seed(0)
    net = PPATDLight(**TINY).eval()
    generator = torch.Generator().manual_seed(1)
    pairs = [(lq, torch.rand(1, 3, 16 * net.upscale, 16 * net.upscale, generator=generator)) for lq in images(4)]

    def error():
        with torch.no_grad():
            return sum((net(lq) - gt).double().square().mean() for lq, gt in pairs).item()

    before = error()
    fit_upsampler(net, pairs, ridge=0)
    best = error()
    assert best < before
    for seed in range(3):
        torch.manual_seed(seed)
        state = net.upsample[0].weight.detach().clone()
        with torch.no_grad():
            net.upsample[0].weight.add_(torch.randn_like(state) * 1e-2)
        assert error() > best
        with torch.no_grad():
            net.upsample[0].weight.copy_(state)


def test_another_scale_keeps_the_body():
    net = PPATDLight(**TINY)
    other, config = with_scale(net, {'type': 'PPATDLight', **TINY}, 3)
    assert config['upscale'] == other.upscale == 3 and other(images(1)[0]).shape == (1, 3, 48, 48)
    assert torch.equal(other.conv_first.weight, net.conv_first.weight)
    with pytest.raises(ValueError, match='there are none'):
        fit_upsampler(other, [])
