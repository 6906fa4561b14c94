"""Kernels that multiply bfloat16, against definitions in float64 whose factors are rounded; nothing changes unasked."""

import math
import threading

import pytest
import torch
from attention_kernels import category_inputs, window_inputs
from layer_kernels import SIZES, needs_native, random, randomise
from torch import nn

from ppsr.archs import ATDLight
from ppsr.ops import native
from ppsr.ops.category_attention import native as category_native
from ppsr.ops.category_attention import reference as category_reference
from ppsr.ops.linear import linear_add, norm_linear
from ppsr.ops.some_linear import norm_linear_some
from ppsr.ops.window_attention import native as window_native
from ppsr.ops.window_attention import reference as window_reference

pytestmark = needs_native


@pytest.fixture(params=['avx512', 'baseline'])
def bf16(request):
    """Context with the instructions, where this processor and the build have them, and without: emulated."""
    if not native.set_target(request.param) or native.bf16_target() is None:
        native.set_target(None)
        pytest.skip(f'no kernels for bfloat16 beside {request.param} here')
    yield native.bf16
    native.set_target(None)


def rounded(x):
    """To bfloat16, to nearest, ties to even; in float64."""
    return x.float().bfloat16().double()


def excess(actual, expected, bound):
    """The largest error as a part of what is allowed."""
    return ((actual.double() - expected).abs() / bound).max().item()


def sums_of(bound):
    """What adding up in float32 may cost, given the sums of the magnitudes."""
    return 3e-6 * (bound + 1)


@pytest.mark.parametrize('n, channels, width', [*SIZES, (9, 1, 16), (20, 33, 40)])
def test_linear_multiplies_rounded_factors(bf16, n, channels, width):
    x, layer = random(n, channels).float(), randomise(nn.Linear(channels, width)).float()
    w, b = layer.weight.data, layer.bias.data.double()
    expected, bound = rounded(x) @ rounded(w).T + b, sums_of(rounded(x).abs() @ rounded(w).abs().T)
    with torch.no_grad():
        before = linear_add(x, layer)
        with bf16():
            actual = linear_add(x, layer)
        after = linear_add(x, layer)
    assert excess(actual, expected, bound) <= 1
    assert excess(before, expected, bound) > 3  # the roundings are seen
    assert torch.equal(before, after)


@pytest.mark.parametrize('some', [False, True], ids=['all', 'some'])
@pytest.mark.parametrize('n, channels', [(1000, 48), (131, 17)])
def test_a_layer_norm_is_rounded_behind_its_division_and_its_weights_with_the_layers(bf16, n, channels, some):
    x = random(1, n, channels).float() * 3 + 1
    norm, layer = (randomise(m).float() for m in (nn.LayerNorm(channels, eps=1e-3), nn.Linear(channels, 3 * channels)))
    z = nn.functional.layer_norm(x.double(), (channels,), eps=1e-3)
    w = rounded(layer.weight.data * norm.weight.data)
    b = layer.bias.data.double() + layer.weight.data.double() @ norm.bias.data.double()
    # what is normalised in float32 lies, once in a while, on the other side of a tie: one rounding more, of one factor
    bound = sums_of(rounded(z).abs() @ w.abs().T + b.abs()) + 2**-7 * z.abs().amax(-1, keepdim=True) * w.abs().amax(-1)
    with torch.no_grad(), bf16():
        if some:
            asking = torch.arange(n).view(1, n) % 3 != 0
            out, _ = norm_linear_some(x, norm, layer, None, asking, asking)
            keep = asking[0]
        else:
            (out,), keep = norm_linear(x, norm, layer), slice(None)
    assert excess(out[0, keep], (rounded(z) @ w.T + b)[0, keep], bound[0, keep]) <= 1


def check_attention(bf16, qkv, scale, kernel, definition):
    """kernel() against definition(qkv) of the factors that it rounds: queries times the scale, keys, values, and
    probabilities, each of them by 2^-8 of itself at most."""
    log2e = torch.tensor(math.log2(math.e), dtype=torch.float32)
    q, k, v = qkv.chunk(3, -1)
    q, k, v = rounded(q * (scale * log2e)) / (scale.double() * math.log2(math.e)), rounded(k), rounded(v)
    expected, most = (definition(torch.cat([q, k, v], -1)) for v in (v, v.abs()))
    bound = 2**-8 * most + 2e-5
    before = kernel()
    with bf16():
        actual = kernel()
    assert excess(actual, expected, bound) <= 1
    of_all, of_probabilities = ((x.double() - expected).square().mean() for x in (before, actual))
    assert of_all > 2 * of_probabilities  # the other roundings are seen
    assert torch.equal(before, kernel())


@pytest.mark.parametrize('dim', [12, 16, 5, 40])
@pytest.mark.parametrize('size, shape, shift', [(16, (16, 32), 8), (3, (6, 9), 1)])
def test_window_attention(bf16, dim, size, shape, shift):
    qkv, table, _ = window_inputs(size, shape, 2, dim, 1)
    qkv[..., : 4 * dim] *= 2
    check_attention(
        bf16,
        qkv,
        torch.tensor(dim**-0.5),
        lambda: window_native.forward(qkv, table, None, 2, size, shift)[0],
        lambda x: window_reference.forward(x, table.double(), None, 2, size, shift)[0],
    )


@pytest.mark.parametrize('dim, group', [(12, 128), (16, 33), (7, 1), (1, 2)])
def test_category_attention(bf16, dim, group):
    qkv, category, pure, scale, _ = category_inputs(200, 2, dim, 5, [0.3])
    check_attention(
        bf16,
        qkv,
        scale,
        lambda: category_native.forward(qkv, category, pure, scale, 2, group, True)[0],
        lambda x: (
            category_reference.forward(x, category, pure, scale.double(), 2, group, False)[0]
            + x.chunk(3, -1)[2] * pure[..., None]
        ),
    )


def test_same_bits_for_any_number_of_threads_and_float32_in_other_threads(bf16, threads):
    qkv, table, _ = window_inputs(8, (24, 40), 4, 12, 2)
    layer = randomise(nn.Linear(48, 48)).float()
    x = random(3000, 48).float()

    def run():
        with torch.no_grad():
            return window_native.forward(qkv, table, None, 4, 8, 3)[0], linear_add(x, layer)

    exact, results, elsewhere = run(), [], []
    for count in (1, 2, 3):
        threads(count)
        with bf16():
            results.append(run())
            thread = threading.Thread(target=lambda: elsewhere.append(run()))
            thread.start()
            thread.join()
    for result, other in zip(results, elsewhere):
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))
        assert all(torch.equal(a, b) for a, b in zip(other, exact))
    assert not any(torch.equal(a, b) for a, b in zip(exact, results[0]))


def test_what_is_not_finite_stays_visible(bf16):
    x = torch.zeros(20, 16)
    x[3, 4], x[7, 8], x[11, 2] = math.nan, math.inf, 3.4e38  # the last is rounded to infinity
    layer = nn.Linear(16, 16)
    with torch.no_grad(), bf16():
        finite = linear_add(x, layer).isfinite().all(1)
    assert (~finite).nonzero().flatten().tolist() == [3, 7, 11]


def test_network_in_bf16(bf16, tiny):
    net, x = ATDLight(**tiny).eval(), torch.rand(1, 3, 20, 24)
    with torch.inference_mode():
        exact = net(x)
        with bf16():
            result = net(x)
        assert 0 < (result - exact).abs().max() < 0.05
        assert torch.equal(net(x), exact)


def test_nothing_is_rounded_without_kernels_for_it():
    if not native.set_target('avx2'):
        pytest.skip('this processor has no avx2')
    try:
        layer, x = nn.Linear(16, 16), random(50, 16).float()
        with torch.no_grad():
            exact = linear_add(x, layer)
            with native.bf16():
                assert torch.equal(linear_add(x, layer), exact)
    finally:
        native.set_target(None)
