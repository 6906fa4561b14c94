"""Linear layers with their neighbours: the compiled kernel against the definition in float64."""

import math

import pytest
import torch
from layer_kernels import SIZES, assert_close, kernel_and_definition, needs_native, random, randomise
from torch import nn

from ppsr.ops import use_backend
from ppsr.ops.linear import linear_add, norm_linear, norm_linear_beside


@needs_native
@pytest.mark.parametrize('n, channels, width', SIZES)
@pytest.mark.parametrize('gelu', [False, True], ids=['linear', 'gelu'])
def test_norm_linear(target, n, channels, width, gelu):
    x = random(2, n, channels) * 3 + 1
    modules = nn.LayerNorm(channels, eps=1e-3), nn.Linear(channels, width), nn.Linear(channels, 8)
    for module in modules:
        randomise(module)
    for actual, expected in zip(*kernel_and_definition(lambda d, *m: norm_linear(x.to(d), *m, gelu=gelu), *modules)):
        assert_close(actual, expected)


@needs_native
@pytest.mark.parametrize('columns', [1, 4, 17])
@pytest.mark.parametrize('n, channels, width', SIZES)
def test_norm_linear_beside(target, n, channels, width, columns):
    x, rows = random(2, n, channels) * 3 + 1, random(9, columns)
    row = torch.randint(9, (n, 2)).T  # not contiguous
    norm, layer = randomise(nn.LayerNorm(channels, eps=1e-3)), randomise(nn.Linear(channels, width))

    def run(dtype, norm, layer):
        return norm_linear_beside(x.to(dtype), norm, layer, rows.to(dtype), row)

    actual, expected = kernel_and_definition(run, norm, layer)
    assert_close(actual, expected)
    assert torch.equal(actual[..., width:], rows[row].float())  # copied


@needs_native
@pytest.mark.parametrize('n, channels, width', SIZES)
@pytest.mark.parametrize('added', [0, 1, 2])
def test_linear_add(target, n, channels, width, added):
    x, add = random(2, n, channels), [random(2, n, width, seed=i) for i in range(added)]
    linear = randomise(nn.Linear(channels, width))
    assert_close(*kernel_and_definition(lambda d, m: linear_add(x.to(d), m, *(a.to(d) for a in add)), linear))


@needs_native
def test_gelu(target):
    """Within 2.5e-7 of max(1, |x|) of x·Φ(x) everywhere, and 0 far below. What is not finite stays visible: −∞ is −∞·0.

    The definition is computed here: PyTorch's own GELU of ±∞ depends on the processor.
    """

    def definition(x):
        return torch.tensor([[value * math.erfc(-value / math.sqrt(2)) / 2] for value in x.flatten().tolist()])

    x = torch.linspace(-12, 12, 24001)[:, None]
    special = torch.tensor([[math.inf], [-math.inf], [math.nan], [-1e30], [1e30], [-0.0]])
    one = nn.Linear(1, 1)
    with torch.no_grad(), use_backend('native'):
        one.weight.fill_(1), one.bias.zero_()
        norm = nn.LayerNorm(1)

        def gelu(x):
            return torch.ops.ppsr.linear(x, [], norm.eps, [one.weight], [one.bias], [], True)[0]

        actual = gelu(x)
        assert ((actual.double() - definition(x.double())).abs() <= 2.5e-7 * x.abs().clamp(min=1)).all()
        assert (actual[x < -5.6] == 0).all()
        assert definition(special).flatten().tolist() == pytest.approx(
            [math.inf, math.nan, math.nan, 0, 1e30, 0], nan_ok=True
        )
        assert torch.allclose(gelu(special), definition(special), rtol=2.5e-7, equal_nan=True)
