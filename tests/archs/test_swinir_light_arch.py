"""SwinIRLight and PPSwinIRLight against basicsr's SwinIR, and their invariants."""

import pytest
import torch
import torch.nn.functional as F
from basicsr.archs.swinir_arch import SwinIR
from flop_counter import flop_counter

from ppsr.archs import PPSwinIRLight, SwinIRLight
from ppsr.archs.build import build_network, config_from
from ppsr.archs.masked import reflect_pad
from ppsr.archs.window_compensation import WINDOW_COMPENSATIONS
from ppsr.cli import main
from ppsr.errors import UserError
from ppsr.ops import use_backend
from ppsr.weights import load_model, save_checkpoint

TINY = dict(upscale=2, embed_dim=20, depths=[2, 3], num_heads=[2, 4], window_size=4, mlp_ratio=2)
LIGHT = dict(embed_dim=60, depths=[6, 6, 6, 6], num_heads=[6, 6, 6, 6], window_size=8, mlp_ratio=2)


def original(**config):
    """basicsr's network with random weights everywhere, the norms and biases included."""
    net = SwinIR(img_size=64, upsampler='pixelshuffledirect', resi_connection='1conv', **config)
    g = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.1 + (p.dim() == 1)
    return net


def flat_photo(h=21, w=30):
    """Three images: some pixels pure, none, all."""
    x = torch.rand(3, 3, h, w)
    x[0, :, :, : w // 2 + 1] = x[2] = 0.3
    return x


@pytest.mark.parametrize('size', [(8, 8), (16, 12), (21, 27), (5, 9)], ids=str)
@pytest.mark.parametrize('scale', [2, 3, 4])
def test_output_is_that_of_basicsr(scale, size):
    theirs = original(**TINY | {'upscale': scale}).double().eval()
    ours = SwinIRLight(**TINY | {'upscale': scale}).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    lq = torch.rand(2, 3, *size, dtype=torch.float64)
    pads = [-side % TINY['window_size'] for side in size]
    with torch.no_grad():
        expected = theirs(F.pad(lq, (0, pads[1], 0, pads[0]), 'reflect'))[..., : scale * size[0], : scale * size[1]]
        for backend in ('reference', 'torch'):
            with use_backend(backend):
                assert (ours(lq) - expected).abs().max() <= 1e-6
        assert (ours.float()(lq.float()) - expected).abs().max() <= 1e-3  # whatever backend is fastest


def test_published_configuration_is_the_default():
    weights = original(**LIGHT, upscale=4).state_dict()
    assert 'layers.0.residual_group.blocks.1.attn_mask' in weights  # the published buffers are accepted on load
    net = SwinIRLight()
    net.load_state_dict(weights, strict=True)
    counts = {scale: sum(p.numel() for p in SwinIRLight(upscale=scale).parameters()) for scale in (2, 3, 4)}
    assert counts == {2: 910_152, 3: 918_267, 4: 929_628}
    config = config_from(weights)
    assert config == {'type': 'SwinIRLight', 'upscale': 4, **LIGHT}
    tokens = 320 * 184  # 180 rows padded to 184
    macs = net.macs(180, 320)
    assert macs['window'] == 24 * tokens * (2 * 64 * 60 + 60 * 60) and macs['ffn'] == 24 * tokens * 2 * 60 * 120


def test_files_of_other_programs_and_ours(tmp_path):
    theirs = original(**TINY)
    save_checkpoint(tmp_path / 'theirs.pth', theirs.state_dict())
    net = load_model(tmp_path / 'theirs.pth')
    assert type(net) is SwinIRLight
    theirs.load_state_dict(net.state_dict(), strict=False)
    missing = set(theirs.state_dict()) - set(net.state_dict())
    assert all(name.endswith('attn_mask') for name in missing)  # of one size of image: not written
    assert main(['convert', '-i', str(tmp_path / 'theirs.pth'), '-o', str(tmp_path / 'ours.safetensors')]) == 0
    masked = load_model(tmp_path / 'ours.safetensors', arch='PPSwinIRLight')
    noise = torch.rand(1, 3, 15, 19)
    with torch.no_grad():
        output, mask = masked(noise, return_mask=True)
        assert not mask.any() and torch.equal(output, net(noise))
    with pytest.raises(UserError, match='no stand-in for window attention'):
        load_model(tmp_path / 'theirs.pth', arch='PPSwinIRLight', settings={'pp_window_compensation': 'linear'})
    learned = PPSwinIRLight(**TINY, pp_window_compensation='linear')
    save_checkpoint(tmp_path / 'learned.pth', learned.state_dict())
    assert type(load_model(tmp_path / 'learned.pth')) is PPSwinIRLight
    assert type(load_model(tmp_path / 'learned.pth', pure_pass=False)) is SwinIRLight
    for other in ({'upsampler': 'pixelshuffle'}, {'upsampler': 'pixelshuffledirect', 'resi_connection': '3conv'}):
        with pytest.raises(UserError, match='these weights are not those'):
            config_from(SwinIR(**TINY, **other).state_dict())


@pytest.mark.parametrize('compensation', WINDOW_COMPENSATIONS)
def test_macs_agree_with_the_flop_counter(compensation):
    net = PPSwinIRLight(**TINY, pp_window_compensation=compensation).eval()
    with torch.no_grad():
        net(flat_photo())  # what follows from the weights alone is no part of the price of an image
    with torch.no_grad(), flop_counter() as counter:
        _, mask = net(flat_photo(), return_mask=True)
    macs, dense = net.macs(21, 30, mask), SwinIRLight(**TINY).macs(21, 30)
    assert mask[2].all() and 2 * sum(macs.values()) == counter.get_total_flops()
    assert macs['window'] < 3 * dense['window'] and macs['qkv'] < 3 * dense['qkv']
    assert set(dense) == {*SwinIRLight.parts}
    every = net.macs(8, 8, torch.ones(1, 8, 8, dtype=torch.bool))
    assert every['window'] == 5 * 64 * 20 * 20 * (2 if compensation == 'linear' else 1) and every['qkv'] == 0


@pytest.mark.parametrize('use_checkpoint', [False, True])
def test_gradients_reach_every_parameter(use_checkpoint):
    net = PPSwinIRLight(**TINY, pp_window_compensation='linear', use_checkpoint=use_checkpoint, drop_path_rate=0.3)
    for lq in (flat_photo(), torch.rand(1, 3, 15, 19)):
        net.zero_grad()
        net(lq).square().mean().backward()
        assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_branches_are_dropped_in_training_alone():
    net, lq = SwinIRLight(**TINY, drop_path_rate=0.5), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        outputs = [net(lq) for _ in range(8)]
        assert not all(torch.equal(outputs[0], output) for output in outputs)
        net.eval()
        assert torch.equal(net(lq), net(lq))


def test_compiles_as_one_graph():
    net, lq = PPSwinIRLight(**TINY | {'depths': [2], 'num_heads': [2]}).eval(), flat_photo()
    with torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend='aot_eager')(lq)
        torch.testing.assert_close(compiled, net(lq), atol=1e-5, rtol=0)


@pytest.mark.parametrize('size', [(1, 1), (1, 9), (3, 2), (17, 5)], ids=str)
def test_any_size(size):
    with torch.no_grad():
        output = PPSwinIRLight(**TINY).eval()(torch.rand(1, 3, *size))
    assert output.shape == (1, 3, 2 * size[0], 2 * size[1]) and output.isfinite().all()


def test_reflect_pad_leaves_the_edge_pixel_out():
    x = torch.arange(3.0).view(1, 1, 1, 3)
    assert reflect_pad(x, 8)[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert reflect_pad(x, 1) is x and reflect_pad(torch.ones(1, 1, 1, 1), 4).shape == (1, 1, 4, 4)
    y = torch.rand(1, 2, 11, 9)
    assert torch.equal(reflect_pad(y, 8), F.pad(y, (0, 7, 0, 5), 'reflect'))


@pytest.mark.parametrize(
    'change, word',
    [
        ({'pp_scope': ['category', 'window']}, 'pp_scope'),
        ({'pp_compensation': 'zero'}, 'pp_compensation'),
        ({'drop_path_rate': 1}, 'drop_path_rate'),
        ({'upsampler': 'pixelshuffle'}, 'upsampler'),
        ({'resi_connection': '3conv'}, 'resi_connection'),
        ({'num_heads': [3, 3]}, 'divisor of embed_dim'),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused(change, word):
    with pytest.raises(UserError, match=word):
        build_network({'type': 'PPSwinIRLight', **TINY, **change})
    with pytest.raises(ValueError, match=word):
        PPSwinIRLight(**TINY | change)
