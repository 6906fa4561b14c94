"""An upsampler in closed form: it is the best one, and finds one that is there."""

import pytest
import torch
import torch.nn.functional as F
from support import TINY

from ppsr.archs import PPATDLight
from ppsr.training.upsampler import fit_upsampler, main, one_colour_pictures, with_scale


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


@pytest.mark.parametrize('scope', [['category'], ['category', 'window']], ids=['category', 'category and window'])
def test_one_colour_pictures_keep_their_colour_however_the_network_runs(scope):
    torch.manual_seed(0)
    net = PPATDLight(**TINY | {'embed_dim': 32, 'pp_scope': scope}).eval()
    colours = torch.tensor([[0.2, 0.5, 1.0]])[:, :, None, None]

    def worst(mask, scope=None):
        with torch.no_grad(), net.exempting(mask, scope):
            return max((net(colours.repeat(1, 1, side, side)) - colours).abs().max().item() for side in (8, 12))

    def error():
        with torch.no_grad():
            return torch.stack([(net(lq) - gt).square().mean() for lq, gt in pairs]).mean().item()

    pairs = [(lq, F.interpolate(lq, scale_factor=net.upscale, mode='bicubic')) for lq in images(6)]
    fit_upsampler(net, pairs)
    before, alone = worst(None), error()
    fit_upsampler(net, pairs, flat=[colours.repeat(1, 1, side, side) for side in (8, 12)])
    assert before > 4 / 255
    assert max(worst(None), worst(net.pure_pass), worst(net.pure_pass, ['category'])) < 2 / 255
    assert error() < 1.5 * alone  # the pairs count, too


def test_one_colour_pictures_are_the_same_each_time():
    first, again = list(one_colour_pictures()), list(one_colour_pictures())
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and {p.shape[-1] for p in first} == {16, 24, 40}
    assert all(torch.equal(p, p[..., :1, :1].expand_as(p)) for p in first)


def test_a_mistake_is_a_sentence(monkeypatch, tmp_path, capsys):
    output = tmp_path / 'x4.safetensors'
    command = ['upsampler', '-n', 'nothing', '--scale', '4', '--data', str(tmp_path), '-o', str(output)]
    monkeypatch.setattr('sys.argv', command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and 'nothing: no such weight file' in capsys.readouterr().err and not output.exists()


def test_what_cannot_be_written_is_known_before_anything_is_computed(monkeypatch, tmp_path, capsys):
    (tmp_path / 'file').touch()
    output = tmp_path / 'file' / 'x4.safetensors'
    command = ['upsampler', '-n', 'PPATDLight_x4', '--scale', '4', '--data', str(tmp_path), '-o', str(output)]
    monkeypatch.setattr('sys.argv', command)
    monkeypatch.setattr('ppsr.training.upsampler.fit_upsampler', lambda *_, **__: pytest.fail('computed'))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and f'{output}: cannot be written' in capsys.readouterr().err
