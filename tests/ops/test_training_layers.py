"""Linear layers and the depthwise convolution with gradients: kernels in float32 against the definition in float64."""

import copy

import pytest
import torch
from layer_kernels import needs_native, random, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

from ppsr.archs import PPATDLight, PPATDLightV2
from ppsr.ops import use_backend
from ppsr.ops.depthwise import depthwise_mix
from ppsr.ops.dictionary import dictionary_attention, dictionary_refinement
from ppsr.ops.linear import linear_add, norm_linear, norm_linear_beside
from ppsr.ops.training_layers import depthwise_training

pytestmark = needs_native

BOUND = 3e-6  # of the largest of a tensor's values: float32 rounds at 6e-8, sums are over up to 1500 products


def gradients(function, inputs, modules, dtype, backend):
    """Results of function(*inputs, *modules) and the gradients of all inputs and parameters, by name."""
    modules = [copy.deepcopy(module).to(dtype) for module in modules]
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    with use_backend(backend):
        out = function(*inputs, *modules)
    weights = [random(*o.shape, seed=9 + i).to(dtype) for i, o in enumerate(out)]
    named = {f'input {i}': x for i, x in enumerate(inputs)}
    named |= {
        f'{i}.{name}': p for i, module in enumerate(modules) for name, p in module.named_parameters() if p.requires_grad
    }
    grads = torch.autograd.grad(out, named.values(), weights)
    return {f'output {i}': o.detach() for i, o in enumerate(out)} | dict(zip(named, grads)), out


def compare(function, inputs, *modules, operator):
    modules = [randomise(module) for module in modules]
    actual, out = gradients(function, inputs, modules, torch.float32, 'native')
    expected, _ = gradients(function, inputs, modules, torch.float64, 'torch')
    assert operator in out[0].grad_fn.name()  # it was the kernel
    for name, value in actual.items():
        assert value.dtype == torch.float32
        assert value.shape == expected[name].shape
        error = (value - expected[name]).abs().max().item() / expected[name].abs().max().clamp(min=1).item()
        assert error <= BOUND, (name, error)


@pytest.mark.parametrize('gelu', [False, True], ids=['linear', 'gelu'])
@pytest.mark.parametrize(
    'n, channels, widths',
    [((2, 7, 9), 48, (144, 8)), ((1500,), 16, (16,)), ((1, 1), 13, (7, 5)), ((3, 33), 60, (123,)), ((2, 50), 7, (48,))],
    ids=str,
)
def test_norm_linear(target, n, channels, widths, gelu):
    layers = [nn.Linear(channels, width) for width in widths]
    x = random(*n, channels)
    compare(
        lambda x, *modules: norm_linear(x, *modules, gelu=gelu),
        [x],
        nn.LayerNorm(channels),
        *layers,
        operator='linear_training',
    )


@pytest.mark.parametrize('added', [0, 1, 2])
@pytest.mark.parametrize('n, channels, width', [(61, 48, 48), (500, 36, 20), (1, 7, 3)])
def test_linear_add(target, n, channels, width, added):
    inputs = [random(n, channels), *(random(n, width, seed=i) for i in range(added))]
    compare(
        lambda x, *more: [linear_add(x, more[-1], *more[:-1])], inputs, nn.Linear(channels, width), operator='linear'
    )


@pytest.mark.parametrize(
    'size, channels, kernel',
    [
        ((2, 9, 11), 48, 7),
        ((1, 33, 20), 20, 5),
        ((1, 5, 3), 7, 3),
        ((1, 1, 1), 16, 7),
        ((1, 19, 8), 17, 9),
        ((1, 4, 4), 3, 1),
    ],
    ids=str,
)
def test_depthwise(target, size, channels, kernel):
    conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
    compare(lambda u, conv: [depthwise_mix(u, conv)], [random(*size, channels)], conv, operator='depthwise_training')


@pytest.mark.parametrize(
    'n, rank, entries, channels',
    [((2, 61), 8, 64, 48), ((1, 1500), 4, 7, 16), ((3, 20), 13, 33, 7), ((1, 2), 1, 2, 1)],
    ids=str,
)
@pytest.mark.parametrize('refined', [False, True], ids=['alone', 'refined'])
def test_dictionary(target, n, rank, entries, channels, refined):
    batch, _ = n

    def run(q, k, v, x, norm):
        out, category, similarity = dictionary_attention(q, k, v)
        found.append(category)
        return [out, *([dictionary_refinement(similarity, x, norm)] if refined else [x.sum(1) * norm.weight.sum()])]

    found = []
    inputs = [random(*n, rank), random(batch, entries, rank, seed=1), random(batch, entries, channels, seed=2)]
    norm = nn.InstanceNorm1d(entries, affine=True)
    norm.bias.requires_grad = False
    compare(run, [*inputs, random(*n, channels, seed=3)], norm, operator='dictionary_training')
    assert (found[0] == found[1]).float().mean() > 0.99  # but for ties
    if refined:
        assert (
            'refinement_training'
            in run(*(t.float().requires_grad_() for t in inputs), random(*n, channels).float(), norm.float())[
                1
            ].grad_fn.name()
        )


def test_the_bias_of_the_refinement_moves_nothing():
    q, k, x = torch.randn(1, 40, 4), torch.randn(1, 8, 4), torch.randn(1, 40, 16)
    norm = nn.InstanceNorm1d(8, affine=True)
    dictionary_refinement(dictionary_attention(q, k, x[:, :8])[2], x, norm).square().sum().backward()
    assert norm.bias.grad.abs().max() == 0 < norm.weight.grad.abs().max()


def test_a_query_of_length_zero():
    q, k, v = torch.zeros(1, 3, 4, requires_grad=True), torch.randn(1, 7, 4), torch.randn(1, 7, 16)
    grads = []
    for backend in ('native', 'torch'):
        with use_backend(backend):
            grads += torch.autograd.grad(dictionary_attention(q, k, v)[0].sum(), q)
    torch.testing.assert_close(*grads)


def test_rows_of_a_table_beside():
    x, rows, row = random(2, 30, 16), random(5, 3), torch.arange(60).view(2, 30) % 5
    compare(
        lambda x, rows, norm, layer: [norm_linear_beside(x, norm, layer, rows, row)],
        [x, rows],
        nn.LayerNorm(16),
        nn.Linear(16, 20),
        operator='Cat',
    )


def test_gradients_are_those_of_the_function():
    """gradcheck, in float64: what a double tensor runs is differentiable."""
    norm, layer, conv = (
        nn.LayerNorm(5).double(),
        nn.Linear(5, 4).double(),
        nn.Conv2d(5, 5, 3, padding=1, groups=5).double(),
    )
    x = random(1, 3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: norm_linear(x, norm, layer, gelu=True)[0], x)
    assert torch.autograd.gradcheck(lambda x: depthwise_mix(x, conv), x)


@pytest.mark.parametrize('count', [2, 3])
def test_any_number_of_threads_gives_the_same(threads, count):
    torch.manual_seed(0)
    norm, layer, conv = nn.LayerNorm(24), nn.Linear(24, 40), nn.Conv2d(24, 24, 7, padding=3, groups=24)
    x = torch.randn(3, 40, 21, 24, requires_grad=True)
    results = []
    for n in (1, count):
        threads(n)
        out = [*norm_linear(x, norm, layer, gelu=True), depthwise_mix(x, conv)]
        parameters = [x, *norm.parameters(), *layer.parameters(), *conv.parameters()]
        results.append(torch.autograd.grad([o.square().sum() for o in out], parameters))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_frozen_unused_and_recomputed():
    """Weights without a gradient, an output that nobody uses, and a layer that is computed again in the backward."""
    torch.manual_seed(0)
    norm, first, second = nn.LayerNorm(16), nn.Linear(16, 20), nn.Linear(16, 4)
    first.weight.requires_grad = False
    x = torch.randn(2, 30, 16, requires_grad=True)
    grads = {}
    for backend in ('native', 'torch'):
        x.grad = norm.weight.grad = None
        with use_backend(backend):
            y = checkpoint(lambda x: norm_linear(x, norm, first, second)[0], x, use_reentrant=False)
            y.square().sum().backward()
        grads[backend] = x.grad, norm.weight.grad
    assert first.weight.grad is None
    for actual, expected in zip(*grads.values()):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_hooks_on_the_way_back_are_called():
    norm, layer = nn.LayerNorm(16), nn.Linear(16, 20)
    seen = []
    layer.register_full_backward_hook(lambda *_: seen.append(1))
    norm_linear(torch.randn(3, 16, requires_grad=True), norm, layer)[0].sum().backward()
    assert seen == [1]


def test_nan_stays_visible():
    conv = nn.Conv2d(16, 16, 3, padding=1, groups=16)
    u = torch.randn(1, 6, 6, 16, requires_grad=True)
    with torch.no_grad():
        u[0, 2, 2, 3] = float('nan')
    out = depthwise_mix(u, conv)
    out.sum().backward()
    assert out.isnan().sum() == 9
    assert u.grad.isnan().any() and conv.weight.grad[3].isnan().all() and conv.weight.grad[4].isfinite().all()
    norm, layer = nn.LayerNorm(16), nn.Linear(16, 8)
    norm_linear(u, norm, layer, gelu=True)[0].sum().backward()
    assert layer.weight.grad.isnan().all()


def test_operators_are_registered_properly():
    x, w, b, ops = torch.randn(2, 3, 5, 16), torch.randn(20, 16), torch.randn(20), torch.ops.ppsr
    norm, add, slope = (torch.randn(16), torch.randn(16)), torch.randn(2, 3, 5, 20), torch.randn(2, 3, 5, 16)
    conv = torch.randn(16, 1, 3, 3), torch.randn(16)
    learned = [t.clone().requires_grad_() for t in (x, *norm, w, b)]
    q, k, v = (torch.randn(2, 30, 4), torch.randn(2, 7, 4), torch.randn(2, 7, 16))
    matrix, tokens, ones = torch.rand(2, 30, 7), torch.randn(2, 30, 16), torch.ones(7)
    refined = ops.refinement_training(matrix, tokens, ones, ones, 1e-5)
    for op, arguments in [
        (ops.dictionary_training, tuple(t.clone().requires_grad_() for t in (q, k, v))),
        (ops.dictionary_training_backward, (tokens, None, q, k, v, matrix)),
        (ops.dictionary_training_backward, (tokens, matrix, q, k, v, matrix)),
        (ops.refinement_training, (*(t.clone().requires_grad_() for t in (matrix, tokens, ones)), ones, 1e-5)),
        (ops.refinement_training_backward, (v, matrix, tokens, ones, *refined)),
        (ops.linear_training, (*learned[:3], 1e-5, *learned[3:], w, b, None, None, True)),
        (ops.linear_training, (x, None, None, 0.0, w, b, None, None, add, add, False)),
        (ops.linear_training_backward, (add, None, x, *norm, 1e-5, w, b, None, None, True)),
        (ops.depthwise_training, (learned[0], *(t.clone().requires_grad_() for t in conv))),
        (ops.depthwise_training_backward, (slope, x, slope, conv[0])),
    ]:
        torch.library.opcheck(op.default, arguments)


def test_operators_refuse_what_does_not_fit():
    x, w, b, ops = torch.randn(2, 3, 5, 16), torch.randn(20, 16), torch.randn(20), torch.ops.ppsr
    grad, kernel = torch.randn(2, 3, 5, 20), torch.randn(16, 1, 3, 3)
    q, k, v = (torch.randn(2, 30, 4), torch.randn(2, 7, 4), torch.randn(2, 7, 16))
    matrix, tokens, ones = torch.rand(2, 30, 7), torch.randn(2, 30, 16), torch.ones(7)
    for op, arguments in [
        (ops.linear_training, (x.double(), None, None, 0.0, w, b, None, None, None, None, False)),
        (ops.linear_training_backward, (grad[..., :8], None, x, None, None, 0.0, w, b, None, None, False)),
        (ops.linear_training_backward, (grad, None, x, None, None, 0.0, w, b[:3], None, None, False)),
        (ops.linear_training_backward, (grad, None, x, b, b, 0.0, w, b, None, None, False)),
        (ops.depthwise_training, (x, kernel[:8], torch.randn(16))),
        (ops.depthwise_training_backward, (x, x, x[:1], kernel)),
        (ops.depthwise_training_backward, (x, x, x, torch.randn(16, 1, 3, 5))),
        (ops.dictionary_training, (q, k[:1], v)),
        (ops.dictionary_training_backward, (tokens, None, q, k, v, matrix[:, :9])),
        (ops.dictionary_training_backward, (v, None, q, k, v, matrix)),
        (ops.refinement_training, (matrix, tokens[:, :9], ones, ones, 1e-5)),
        (ops.refinement_training, (matrix, tokens, ones[:3], ones, 1e-5)),
        (ops.refinement_training_backward, (v, matrix, tokens, ones, v, v)),
    ]:
        with pytest.raises(ValueError, match='the operator takes'):
            op(*arguments)


def test_compiled_networks_take_the_definition():
    """torch.compile sees PyTorch's operators, which it fuses itself; the operator by name it takes as it is."""
    u, conv = torch.randn(1, 4, 4, 16, requires_grad=True), nn.Conv2d(16, 16, 3, padding=1, groups=16)
    for function in (lambda u: depthwise_mix(u, conv), lambda u: depthwise_training(u, conv.weight, conv.bias)):
        compiled = torch.compile(function, backend='aot_eager', fullgraph=True)
        (actual,) = torch.autograd.grad(compiled(u).square().sum(), u)
        (expected,) = torch.autograd.grad(depthwise_mix(u, conv).square().sum(), u)
        assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize('arch', [PPATDLight, PPATDLightV2])
def test_whole_network(arch):
    torch.manual_seed(0)
    settings = dict(upscale=2, embed_dim=16, depths=[2], num_heads=[2], window_size=8, category_size=16, num_tokens=8)
    net, x = arch(**settings), torch.rand(2, 3, 19, 24)
    parameters = list(net.parameters())
    with use_backend('native'):
        actual = torch.autograd.grad(net(x).square().mean(), parameters, allow_unused=True)
    net = net.double()
    with use_backend('torch'):
        expected = torch.autograd.grad(net(x.double()).square().mean(), list(net.parameters()), allow_unused=True)
    for (name, _), a, e in zip(net.named_parameters(), actual, expected):
        assert (a is None) == (e is None), name
        if a is not None:
            assert (a - e).abs().max() <= 1e-4 * e.abs().max() + 1e-7, name
