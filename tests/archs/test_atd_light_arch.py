"""Both versions of ATD-light and their Pure-Pass versions against the published networks, and their invariants."""

import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from flop_counter import flop_counter
from support import REPOSITORY, TINY

from ppsr.archs import ATDLight, ATDLightV2, PPATDLight, PPATDLightV2
from ppsr.archs.masked import mirror_pad
from ppsr.ops import use_backend

GOLDEN = REPOSITORY / 'tests' / 'golden'
DENSE, MASKED = (ATDLight, ATDLightV2), (PPATDLight, PPATDLightV2)
EACH = pytest.mark.parametrize('arch', DENSE + MASKED)
EACH_MASKED = pytest.mark.parametrize('arch', MASKED)


def golden(name):
    file = np.load(GOLDEN / f'golden_{name}.npz')
    weights = {key[2:]: torch.from_numpy(file[key]) for key in file.files if key.startswith('w:')}
    return weights, torch.from_numpy(file['input']), torch.from_numpy(file['output'])


def flat_photo(b=1, h=21, w=27, seed=0) -> torch.Tensor:
    """Random images with flat regions: some pixels are pure, others are not."""
    coarse = torch.rand(b, 3, -(-h // 12), -(-w // 12), generator=torch.Generator().manual_seed(seed))
    x = coarse.repeat_interleave(12, -1).repeat_interleave(12, -2)[..., :h, :w].clone()
    x[..., : h // 3, : w // 2] = torch.rand(b, 3, h // 3, w // 2, generator=torch.Generator().manual_seed(seed + 1))
    return x


@pytest.mark.parametrize('backend', ['reference', None], ids=['reference', 'automatic'])
@pytest.mark.parametrize(
    'name, arch, config',
    [
        ('tiny_x2', ATDLight, TINY),
        ('light_x4', ATDLight, {}),
        ('v2_tiny_x2', ATDLightV2, TINY | {'dim_ffn_td': 3}),
        ('v2_light_x4', ATDLightV2, {}),
    ],
    ids=['tiny_x2', 'light_x4', 'v2_tiny_x2', 'v2_light_x4'],
)
def test_output_is_that_of_the_published_network(name, arch, config, backend):
    weights, lq, expected = golden(name)
    assert 'relative_position_index_SA' in weights  # the published buffer is accepted on load
    net = arch(**config)
    net.load_state_dict(weights, strict=True)
    with torch.no_grad(), use_backend(backend):
        output = net.double().eval()(lq.double())
    assert output.dtype == torch.float64
    assert (output - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    'dense, masked, at_x4, thousands',
    [(ATDLight, PPATDLight, 768_792, [753, 760, 769]), (ATDLightV2, PPATDLightV2, 776_544, [761, 767, 777])],
)
def test_parameters_are_counted_as_published(dense, masked, at_x4, thousands):
    counts = {s: sum(p.numel() for p in dense(upscale=s).parameters()) for s in (2, 3, 4)}
    assert counts[4] == at_x4
    assert [round(counts[s] / 1000) for s in (2, 3, 4)] == thousands
    assert sum(p.numel() for p in masked().parameters()) == counts[4]


@EACH
def test_own_checkpoints_hold_the_names_and_the_buffer_of_the_published(arch, tiny):
    weights, _, _ = golden('v2_tiny_x2' if issubclass(arch, ATDLightV2) else 'tiny_x2')
    state = arch(**tiny).state_dict()
    assert set(state) == set(weights)
    buffer = 'relative_position_index_SA'
    assert torch.equal(state[buffer], torch.as_tensor(weights[buffer])) and state[buffer].dtype == torch.int64


def test_defaults_are_the_published_option_file():
    explicit = ATDLight(
        upscale=4,
        in_chans=3,
        img_size=64,
        embed_dim=48,
        depths=[6, 6, 6, 6],
        num_heads=[4, 4, 4, 4],
        window_size=16,
        category_size=128,
        num_tokens=64,
        reducted_dim=8,
        convffn_kernel_size=7,
        img_range=1.0,
        mlp_ratio=1,
        upsampler='pixelshuffledirect',
        resi_connection='1conv',
        use_checkpoint=False,
    )
    assert str(explicit) == str(ATDLight())


@EACH
def test_registered_in_basicsr(arch, tiny):
    own = {'pp_num_centers': 5} if arch in MASKED else {}
    assert isinstance(build_network({'type': arch.__name__, **tiny, **own}), arch)


@pytest.mark.parametrize('masked, dense', list(zip(MASKED, DENSE)))
def test_nothing_pure_is_atd_light_exactly(masked, dense, tiny):
    lq = torch.rand(2, 3, 16, 24)
    net, plain = masked(**tiny), dense(**tiny)
    plain.load_state_dict(net.state_dict())
    output, mask = net(lq, return_mask=True)
    assert not mask.any()
    assert torch.equal(output, plain(lq))


@pytest.mark.parametrize('compensation', ['value', 'bypass', 'zero'])
@EACH_MASKED
def test_all_pure_does_no_category_attention(arch, tiny, compensation):
    net = arch(**tiny, pp_compensation=compensation).double()
    lq = torch.full((1, 3, 16, 16), 0.3, dtype=torch.float64)
    branch = net.layers[0].residual_group.layers[0].attn_aca
    seen = {}
    branch.register_forward_hook(lambda module, inputs, output: seen.update(inputs=inputs, output=output))
    _, mask = net(lq, return_mask=True)
    assert mask.all()
    v = seen['inputs'][0][..., 2 * TINY['embed_dim'] :]
    expected = {'value': branch.proj(v), 'bypass': v, 'zero': torch.zeros_like(v)}[compensation]
    assert torch.allclose(seen['output'], expected + seen['inputs'][3], atol=1e-12)  # plus the dictionary's share
    assert net.macs(16, 16, mask)['category'] == (4 * 256 * 16 * 16 if compensation == 'value' else 0)


@pytest.mark.parametrize('compensation', ['value', 'bypass', 'zero'])
@EACH_MASKED
def test_pure_tokens_leave_the_others_alone(arch, tiny, compensation):
    """What a pure token looks like cannot reach the attention of the others (checked on the branch itself)."""
    net = arch(**tiny, pp_compensation=compensation).double()
    branch = net.layers[0].residual_group.layers[0].attn_aca
    qkv, category = torch.randn(1, 40, 48, dtype=torch.float64), torch.randint(8, (1, 40))
    pure = torch.rand(1, 40) < 0.4
    before = branch(qkv, category, pure)
    after = branch(torch.where(pure[..., None], torch.randn_like(qkv), qkv), category, pure)
    assert torch.equal(before[~pure], after[~pure])
    assert compensation == 'zero' or not torch.equal(before[pure], after[pure])


@EACH
@pytest.mark.parametrize('size', [(1, 1), (1, 9), (3, 2), (8, 8), (17, 5)], ids=str)
def test_any_size(arch, tiny, size):
    for scale in (2, 3, 4):
        net = arch(**(tiny | {'upscale': scale})).eval()
        with torch.no_grad():
            output = net(torch.rand(1, 3, *size))
        assert output.shape == (1, 3, scale * size[0], scale * size[1])
        assert output.isfinite().all()


@EACH
def test_an_image_does_not_depend_on_its_batch(arch, tiny):
    net = arch(**tiny).double().eval()
    lq = torch.cat([flat_photo(seed=s) for s in (1, 2)] + [torch.full((1, 3, 21, 27), 0.2)]).double()
    with torch.no_grad():
        together = net(lq)
        for b in range(len(lq)):
            alone = net(lq[b : b + 1])[0]
            assert (together[b] - alone).abs().max() < 1e-10, f'image {b}'


def test_mirror_pad_repeats_the_edge_pixel():
    x = torch.arange(3.0).view(1, 1, 1, 3)
    assert mirror_pad(x, 8)[0, 0, 0].tolist() == [0, 1, 2, 2, 1, 0, 0, 1]
    assert mirror_pad(x, 8).shape == (1, 1, 8, 8)
    assert mirror_pad(x, 1) is x


def test_mask_is_computed_on_the_padded_input(tiny):
    lq = flat_photo(h=13, w=9)
    _, mask = PPATDLight(**tiny)(lq, return_mask=True)
    assert torch.equal(mask, PPATDLight(**tiny).pure_pass(mirror_pad(lq, 8)))


@pytest.mark.parametrize(
    'arch, extra',
    [
        *((arch, {}) for arch in DENSE),
        *((arch, {'pp_compensation': c}) for arch in MASKED for c in ('value', 'bypass', 'zero')),
    ],
    ids=lambda p: p.__name__ if isinstance(p, type) else ''.join(p.values()),
)
def test_macs_agree_with_the_flop_counter(arch, extra, tiny):
    net = arch(**tiny, **extra).eval()
    lq = flat_photo(b=2, h=21, w=30)
    with torch.no_grad():
        net(lq)  # what follows from the weights alone is computed once, and is no part of the price of an image
    with torch.no_grad(), flop_counter() as counter:
        _, mask = net(lq, return_mask=True)
    if mask is None:
        mask = torch.zeros(2, 24, 32, dtype=torch.bool)
    else:
        assert 0 < mask[0].float().mean() < 1 and mask[0].sum() != mask[1].sum()
    assert 2 * sum(net.macs(21, 30, mask).values()) == counter.get_total_flops()


@EACH_MASKED
def test_gradients_reach_every_parameter(arch, tiny):
    net = arch(**tiny)
    net(flat_photo()).square().mean().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


@EACH_MASKED
def test_checkpointing_changes_nothing_but_memory(arch, tiny):
    lq, grads = flat_photo(), []
    for use_checkpoint in (False, True):
        torch.manual_seed(0)
        net = arch(**tiny, use_checkpoint=use_checkpoint)
        net(lq).square().mean().backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
    for name in grads[0]:
        assert torch.equal(grads[0][name], grads[1][name]), name


@EACH
def test_compiles_as_one_graph(arch, tiny):
    net = arch(**tiny | {'depths': [2], 'num_heads': [2]}).eval()
    lq = flat_photo()
    with torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend='aot_eager')(lq)
        assert torch.allclose(compiled, net(lq), atol=1e-5)


@EACH
def test_bfloat16_autocast(arch, tiny):
    net = arch(**tiny)
    lq = flat_photo()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        output = net(lq)
    output.float().square().mean().backward()
    assert output.isfinite().all()
    assert (output.float() - net(lq)).abs().mean() < 0.02
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    'kwargs, word',
    [
        ({'in_chans': 1}, 'in_chans=1'),
        ({'img_range': 255.0}, 'img_range=255.0'),
        ({'upsampler': 'pixelshuffle'}, "upsampler='pixelshuffle'"),
        ({'resi_connection': '3conv'}, "resi_connection='3conv'"),
        ({'num_heads': [5, 4, 4, 4]}, 'divisor of embed_dim'),
        ({'num_heads': [4]}, 'one number for each of depths'),
        ({'convffn_kernel_size': 4}, 'odd'),
        ({'upscale': 0}, 'upscale=0'),
        ({'window_size': '16'}, "window_size='16'"),
    ],
    ids=str,
)
@pytest.mark.parametrize('arch', DENSE)
def test_what_is_not_supported_is_refused(arch, kwargs, word):
    with pytest.raises(ValueError, match='not supported') as e:
        arch(**kwargs)
    assert word in str(e.value)


def test_compensation_is_checked():
    with pytest.raises(ValueError, match="pp_compensation='average'"):
        PPATDLight(pp_compensation='average')


@pytest.mark.parametrize('shape', [(3, 8, 8), (1, 1, 8, 8), (1, 3, 0, 8)], ids=str)
def test_input_shape_is_checked(shape, tiny):
    with pytest.raises(ValueError, match=r'\(B, 3, H, W\)'):
        ATDLight(**tiny)(torch.rand(shape))
