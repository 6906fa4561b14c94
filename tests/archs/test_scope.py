"""Window attention in the scope of Pure-Pass: what pure tokens get instead, what it costs, which files fit."""

import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flop_counter import flop_counter
from PIL import Image
from support import TINY

from ppsr.archs import ATDLight, ATDLightV2, PPATDLight, PPATDLightV2, PPSwinIRLight
from ppsr.archs.build import build_network, config_from
from ppsr.archs.window_compensation import WINDOW_COMPENSATIONS
from ppsr.cli import main
from ppsr.errors import UserError
from ppsr.ops import use_backend, workspace
from ppsr.ops.stand_in import mean5
from ppsr.weights import load_model, save_checkpoint

BOTH = ['category', 'window']
EACH = pytest.mark.parametrize('compensation', WINDOW_COMPENSATIONS)


def network(compensation='linear', scope=BOTH, arch=PPATDLight, **changes):
    return arch(**TINY | changes, pp_scope=scope, pp_window_compensation=compensation)


def batch(h=21, w=27):
    """Three images: some pixels pure, none, all."""
    x = torch.rand(3, 3, h, w)
    x[0, :, :, : w // 2 + 1] = x[2] = 0.3
    return x


def first_layer(net):
    return net.layers[0].residual_group.layers[0]


def window_branch(net, lq):
    """What the first layer's window attention is given and returns."""
    seen = {}

    def remember(module, inputs, kwargs, output):
        seen.update(kwargs, qkv=inputs[0], add=inputs[2:], output=output)

    branch = first_layer(net).attn_win
    with branch.register_forward_hook(remember, with_kwargs=True), torch.no_grad():
        net(lq)
    return branch, seen


@EACH
def test_pure_tokens_get_it_before_the_projection(compensation):
    net = network(compensation).double()
    x = first_layer(net)
    seen_by_norm = {}
    x.norm1.register_forward_hook(lambda module, inputs, output: seen_by_norm.update(z=output))
    branch, seen = window_branch(net, batch().double())
    v = seen['qkv'][..., 2 * TINY['embed_dim'] :]
    if compensation == 'linear':
        z = seen_by_norm['z']
        expected = F.linear(torch.cat([z, mean5(z)], -1), x.comp.weight, x.comp.bias)
    else:
        expected = v if compensation == 'value' else mean5(v)
    expected, got, pure = branch.proj(expected), seen['output'] - sum(seen['add']), seen['pure']
    assert pure[2].all() and not pure[1].any() and pure[0].any() and not pure[0].all()
    torch.testing.assert_close(got[pure], expected[pure])
    dense = branch(seen['qkv'], 0)
    torch.testing.assert_close(got[~pure], dense[~pure])  # they see pure tokens as keys and values, as ever


@pytest.mark.parametrize('masked, dense', [(PPATDLight, ATDLight), (PPATDLightV2, ATDLightV2)])
@EACH
def test_nothing_pure_is_the_dense_network_bit_for_bit(compensation, masked, dense):
    lq = torch.rand(2, 3, 16, 24)
    net, dense = network(compensation, arch=masked).eval(), dense(**TINY).eval()
    dense.load_state_dict(net.state_dict())
    with torch.no_grad():
        output, mask = net(lq, return_mask=True)
        assert not mask.any() and torch.equal(output, dense(lq))


@pytest.mark.parametrize('backend', ['reference', 'torch', 'native'])
def test_backends_agree(backend):
    net, lq = network().eval(), batch()
    with torch.no_grad():
        with use_backend('reference'):
            expected = net.double()(lq.double())
        with use_backend(backend):
            output = net.float()(lq)
    torch.testing.assert_close(output.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize('arch', [PPATDLight, PPATDLightV2])
@pytest.mark.parametrize('scope', [BOTH, ['window'], ['category']], ids='-'.join)
@EACH
def test_macs_agree_with_the_flop_counter(compensation, scope, arch):
    net, lq = network(compensation, scope, arch).eval(), batch(21, 30)
    with torch.no_grad():
        net(lq)  # what follows from the weights alone is no part of the price of an image
    with torch.no_grad(), flop_counter() as counter:
        _, mask = net(lq, return_mask=True)
    macs, dense = net.macs(21, 30, mask), net.macs(21, 30)
    assert 2 * sum(macs.values()) == counter.get_total_flops()
    assert (macs['window'] < 3 * dense['window']) == ('window' in scope)
    assert (macs['category'] < 3 * dense['category']) == ('category' in scope)


@EACH
def test_all_pure_attends_to_nothing(compensation):
    net = network(compensation)
    macs = net.macs(16, 16, torch.ones(1, 16, 16, dtype=torch.bool))
    c, layers = TINY['embed_dim'], 4
    sees = 1 if compensation == 'value' else 2  # the value vector, through the projection of AC-MSA, is one of two
    assert macs['window'] == layers * 256 * sees * c * c and macs['qkv'] == macs['category'] == 0


@pytest.mark.parametrize('arch', [PPATDLight, PPATDLightV2])
@pytest.mark.parametrize('scope', [BOTH, ['window']], ids='-'.join)
@pytest.mark.parametrize('of_category', ['value', 'bypass', 'zero'])
@EACH
def test_all_that_pure_tokens_get_in_one_product_is_what_each_attention_gives(compensation, of_category, scope, arch):
    net = network(compensation, scope, arch, pp_compensation=of_category).eval().double()
    layer, lq = first_layer(net), batch(24, 32).double()
    for parameter in net.parameters():
        parameter.data += torch.randn_like(parameter) / 8  # biases are zeros at first
    each = net(lq).detach()  # gradients are wanted: nothing is put together
    for backend in ('torch', 'reference'):
        with torch.no_grad(), use_backend(backend):
            torch.testing.assert_close(net(lq), each, atol=1e-9, rtol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(net.float()(lq.float()).double(), each, atol=2e-3, rtol=0)
        assert layer.kept._kept is not None


@pytest.mark.parametrize('arch', [PPATDLight, PPATDLightV2, PPSwinIRLight])
def test_nobody_reads_what_nobody_wrote(arch, monkeypatch):
    def full_of_nan(like, shape, dtype=None):
        dtype = dtype or like.dtype
        return torch.full(shape, float('nan') if dtype.is_floating_point else -1, dtype=dtype)

    sizes = TINY if arch is not PPSwinIRLight else {key: TINY[key] for key in ('embed_dim', 'depths', 'num_heads')}
    net, lq = arch(**sizes | {'window_size': 8}, pp_scope=list(arch.scopes)).eval(), batch()
    with torch.no_grad():
        expected = net(lq)
        for name, module in list(sys.modules.items()):
            if name.startswith('ppsr.') and getattr(module, 'empty', None) is workspace.empty:
                monkeypatch.setattr(module, 'empty', full_of_nan)
        assert torch.equal(net(lq), expected)


def test_what_is_put_together_follows_the_weights():
    net, lq = network().eval().double(), batch().double()
    with torch.no_grad():
        net(lq)
        for name in (
            'comp.weight',
            'comp.bias',
            'wqkv.weight',
            'wqkv.bias',
            'attn_win.proj.weight',
            'attn_aca.proj.bias',
        ):
            first_layer(net).get_parameter(name).data.mul_(1.5).add_(0.01)
            output = net(lq)
            with torch.enable_grad():
                torch.testing.assert_close(output, net(lq).detach(), atol=1e-10, rtol=1e-10)


def test_modules_that_somebody_watches_or_replaced_are_called():
    net, lq = network().eval(), batch()
    layer, calls = first_layer(net), []
    with torch.no_grad():
        together = net(lq)
        for module in (layer.attn_win, layer.attn_aca, layer.attn_aca.proj, layer.comp, layer.wqkv):
            with module.register_forward_hook(lambda module, *_: calls.append(module)):
                torch.testing.assert_close(net(lq), together, atol=1e-4, rtol=0)
        assert calls == [layer.attn_win, layer.attn_aca, layer.attn_aca.proj, layer.comp, layer.wqkv]


@pytest.mark.parametrize('backend', ['torch', 'native'])
def test_what_a_hook_keeps_is_not_written_over(backend):
    net, lq = network().eval(), batch()
    for name, module in first_layer(net).named_modules():
        kept = []

        def keep(module, inputs, output, kept=kept):
            outputs = output if isinstance(output, tuple) else (output,)
            kept.extend((o, o.clone()) for o in outputs if isinstance(o, torch.Tensor))

        with torch.no_grad(), use_backend(backend), module.register_forward_hook(keep):
            net(lq)
        assert all(torch.equal(*pair) for pair in kept), name


@pytest.mark.parametrize('of_category', ['value', 'bypass', 'zero'])
@pytest.mark.parametrize('scope', [BOTH, ['category']], ids='-'.join)
@pytest.mark.parametrize('backend', ['torch', 'native'])
def test_an_image_alone_is_what_it_is_beside_others(backend, scope, of_category):
    net, lq = network(scope=scope, pp_compensation=of_category).eval(), batch(32, 32)
    with torch.no_grad(), use_backend(backend):
        together, alone = net(lq), torch.cat([net(image[None]) for image in lq])
    if backend == 'native':
        assert torch.equal(together, alone)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize('scope', [BOTH, ['window']], ids='-'.join)
@pytest.mark.parametrize('pure', [True, False, None], ids=['all', 'none', 'some'])
def test_gradients_reach_every_parameter(scope, pure, monkeypatch):
    """Also where a batch is pure or not at all: DistributedDataParallel waits for each."""
    net = network(scope=scope)
    if pure is not None:
        monkeypatch.setattr(net, 'pure_mask', lambda x: torch.full((len(x), *x.shape[2:]), pure))
    net(batch()).square().mean().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert (first_layer(net).comp.weight.grad.abs().sum() > 0) == (pure is not False)


@EACH
def test_gradients_are_right(compensation):
    """Of a loss with respect to everything in a layer, against finite differences."""
    net = network(compensation, depths=[1], num_heads=[2], embed_dim=4, window_size=4, num_tokens=2, reducted_dim=2)
    layer = first_layer(net.double())
    pure = torch.rand(1, 16) < 0.4
    td = net.layers[0].residual_group.td.detach()[None]

    def run(x, *parameters):
        names = [name for name, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x, td, pure))[0]

    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    with use_backend('torch'):
        assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)


def test_checkpointing_changes_nothing_but_memory():
    grads = []
    for use_checkpoint in (False, True):
        torch.manual_seed(0)
        net = network(use_checkpoint=use_checkpoint)
        net(batch()).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(map(torch.equal, *grads))


@EACH
def test_compiles_as_one_graph(compensation):
    net, lq = network(compensation, depths=[1], num_heads=[2]).eval(), batch()
    with torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend='aot_eager')(lq)
        torch.testing.assert_close(compiled, net(lq), atol=1e-5, rtol=0)


@EACH
def test_bfloat16_autocast(compensation):
    net = network(compensation)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        output = net(batch())
    output.float().square().mean().backward()
    assert (output.float() - net(batch())).abs().mean() < 0.2 and all(p.grad.isfinite().all() for p in net.parameters())


# ------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def files(tmp_path):
    """Weights with a stand-in and without, each as .pth, which does not say what it holds, and as .safetensors."""
    for name, net in (('with', network(category_size=128)), ('without', ATDLight(**TINY | {'category_size': 128}))):
        save_checkpoint(tmp_path / f'{name}.pth', net.state_dict())
        config = {'type': 'PPATDLight', **TINY, 'category_size': 128}
        save_checkpoint(tmp_path / f'{name}.safetensors', net.state_dict(), config)
    return tmp_path


def test_the_stand_in_is_known_by_its_name(files):
    net = load_model(files / 'with.pth')
    assert isinstance(net, PPATDLight) and first_layer(net).comp.weight.shape == (16, 32)
    assert config_from(net.state_dict())['pp_scope'] == BOTH
    assert type(load_model(files / 'without.pth')) is ATDLight
    assert not [name for name in network('value').state_dict() if 'comp' in name]


def test_one_file_serves_every_scope(files):
    paper = load_model(files / 'with.safetensors')  # its configuration says nothing of a scope
    assert isinstance(paper, PPATDLight) and first_layer(paper).comp is None
    fast = load_model(files / 'with.safetensors', settings={'pp_scope': BOTH})
    assert first_layer(fast).comp is not None
    for dense in (load_model(files / 'with.pth', pure_pass=False), load_model(files / 'with.pth', arch='ATDLight')):
        assert type(dense) is ATDLight
    noise = torch.rand(1, 3, 16, 24)  # nothing is pure
    with torch.no_grad():
        assert torch.equal(paper(noise), dense(noise)) and torch.equal(fast(noise), dense(noise))


def test_the_command_line_chooses_mask_and_scope(files, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    pixels[:, :24] = [200, 30, 30] + pixels[:, :24] // 64  # nearly flat, and red
    Image.fromarray(pixels).save(files / 'lq.png')
    command = ['upscale', '-i', str(files / 'lq.png'), '-o', str(files / 'out.png'), '--overwrite', '--device', 'cpu']
    command += ['--model-path', str(files / 'with.safetensors')]
    saved = []
    for options in ([], ['--scope', 'category', 'window'], ['--mask', 'variance', '--threshold', '0.001']):
        assert main([*command, *options]) == 0
        said = re.search(r'saved by Pure-Pass \(([\d.]+)%\)', capsys.readouterr().out)
        saved.append(float(said[1]) if said else 0)
    assert saved[1] > saved[0] > saved[2] == 0
    for wrong in (
        ['--scope', 'window', '--no-pure-pass'],
        ['--arch', 'ATDLight', '--scope', 'window'],
        ['--mask', 'flat'],
    ):
        assert main([*command, *wrong]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_strict_loading_refuses_everything_else(files):
    state = network().state_dict()
    PPATDLight(**TINY).load_state_dict(state)
    for name in ('layers.0.comp.weight', 'layers.0.residual_group.layers.7.comp.weight', 'comp.weight'):
        with pytest.raises(RuntimeError, match='Unexpected'):
            PPATDLight(**TINY).load_state_dict(state | {name: torch.zeros(1)})
        save_checkpoint(files / 'strange.safetensors', state | {name: torch.zeros(1)}, {'type': 'PPATDLight', **TINY})
        with pytest.raises(UserError, match='1 unexpected'):
            load_model(files / 'strange.safetensors')


def test_weights_without_a_stand_in_say_what_to_do(files):
    for name in ('without.pth', 'without.safetensors'):
        with pytest.raises(UserError, match='has no stand-in for window attention.*ppsr calibrate') as e:
            load_model(files / name, arch='PPATDLight', settings={'pp_scope': BOTH})
        assert '\n' not in str(e.value)
    value = {'pp_scope': BOTH, 'pp_window_compensation': 'value'}
    assert first_layer(load_model(files / 'without.safetensors', settings=value)).comp is not None


@pytest.mark.parametrize(
    'change, word',
    [
        ({'pp_scope': []}, 'pp_scope'),
        ({'pp_scope': 'window'}, 'pp_scope'),
        ({'pp_scope': ['colour']}, 'pp_scope'),
        ({'pp_scope': ['window', 'window']}, 'pp_scope'),
        ({'pp_scope': [['window']]}, 'pp_scope'),
        ({'pp_window_compensation': 'zero'}, 'pp_window_compensation'),
        ({'pp_threshold': 0}, 'pp_threshold'),
        ({'pp_threshold': 3}, 'pp_threshold'),
        ({'type': 'CAMixerATDLight', 'pp_scope': BOTH}, 'CAMixerATDLight takes no option'),
        ({'type': 'ATDLight', 'pp_scope': BOTH}, 'ATDLight takes no option'),
    ],
    ids=str,
)
def test_what_is_refused(change, word):
    with pytest.raises(UserError, match=word):
        build_network({'type': 'PPATDLight', **TINY} | change)
    if change.get('type') is None and 'pp_threshold' not in change:
        with pytest.raises(ValueError, match=word):
            PPATDLight(**TINY, **change)
