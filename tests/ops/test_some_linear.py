"""Linear layers for some tokens: the kernels against the definitions in float64, whom they leave alone."""

import pytest
import torch
from layer_kernels import SIZES, assert_close, kernel_and_definition, needs_native, random, randomise
from torch import nn

from ppsr.ops import use_backend
from ppsr.ops.linear import linear_add, norm_linear
from ppsr.ops.some_linear import linear_some, norm_linear_some, of_windows_that_ask


def masks(n, share):
    """(1, n) bool: some, in stretches and one by one; and those and others."""
    g = torch.Generator().manual_seed(2)
    some = torch.rand(1, n, generator=g) < share
    some[:, n // 3 : n // 2] = share > 0.3
    return some, some | (torch.rand(1, n, generator=g) < share)


@needs_native
@pytest.mark.parametrize('share', [0, 0.1, 0.6, 1])
@pytest.mark.parametrize('n, c, outputs', SIZES)
def test_queries_keys_and_values(target, n, c, outputs, share):
    asking, heard = masks(n, share)
    x = random(1, n, c) * 3 + 1
    norm, qkv, beside = nn.LayerNorm(c, eps=1e-3), nn.Linear(c, 3 * c), nn.Linear(c, outputs)
    wanted = torch.cat([asking[..., None].expand(1, n, c), heard[..., None].expand(1, n, 2 * c)], -1)

    def run(dtype, norm, qkv, beside=None):
        some, every = norm_linear_some(x.to(dtype), norm, qkv, beside, asking, heard)
        return torch.cat([some.where(wanted, some.new_zeros(())), every], -1)

    for modules in ((norm, qkv, beside), (norm, qkv)):
        assert_close(*kernel_and_definition(run, *map(randomise, modules)))


@needs_native
@pytest.mark.parametrize('share', [0, 0.1, 0.6, 1])
@pytest.mark.parametrize('n, c, outputs', SIZES)
def test_projection(target, n, c, outputs, share):
    only = masks(n, share)[0]
    x, out, add = random(1, n, c), random(1, n, outputs, seed=1), random(1, n, outputs, seed=2)
    layer = randomise(nn.Linear(c, outputs))

    def run(dtype, layer):
        to = out.to(dtype)
        return linear_some(to, x.to(dtype), layer, only, to, add.to(dtype))

    actual, expected = kernel_and_definition(run, layer)
    assert_close(actual, expected)
    assert torch.equal(actual[~only], out.float()[~only])


@needs_native
def test_rows_are_bit_for_bit_those_of_the_whole_layer(target):
    """So that an image's output does not depend on whether another of its batch has pure pixels."""
    x, add = random(1, 1500, 48).float(), random(1, 1500, 48, seed=1).float()
    asking, heard = masks(1500, 0.5)
    norm, qkv, wq, proj = nn.LayerNorm(48), nn.Linear(48, 144), nn.Linear(48, 8), nn.Linear(48, 48)
    before = torch.get_num_threads()
    with torch.no_grad(), use_backend('native'):
        whole, q = norm_linear(x, norm, qkv, wq)
        projected = linear_add(x, proj, add)
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                some, some_q = norm_linear_some(x, norm, qkv, wq, asking, heard)
                assert torch.equal(some_q, q) and torch.equal(some[..., :48][asking], whole[..., :48][asking])
                assert torch.equal(some[..., 48:][heard], whole[..., 48:][heard])
                out = linear_some(torch.zeros_like(x), x, proj, asking, add)
                assert torch.equal(out[asking], projected[asking]) and not out[~asking].any()
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize('shift', [0, 1, 2])
def test_windows_that_ask(shift):
    pure = torch.ones(2, 8, 12, dtype=torch.bool)
    pure[0, 5, 6] = pure[1, 0, 0] = False
    heard, expected = of_windows_that_ask(pure, 4, shift), torch.zeros_like(pure)
    window = torch.arange(8)[:, None] // 4 * 3 + torch.arange(12) // 4  # of the map that is rolled
    window = window.roll((shift, shift), (0, 1))
    expected[0] = window == window[5, 6]
    expected[1] = window == window[0, 0]
    assert torch.equal(heard, expected)


@needs_native
def test_registered_properly_and_refuses_what_does_not_fit():
    x, asking = random(1, 70, 16).float(), masks(70, 0.5)[0]
    norm, qkv = [torch.rand(16), torch.rand(16)], [torch.rand(48, 16), torch.rand(48)]
    op = torch.ops.ppsr.linear_some
    torch.library.opcheck(op.default, (x.clone(), x, qkv[0][:16], qkv[1][:16], [x], asking))
    for wrong in (
        (x, x, *qkv, [], asking),
        (x, x, qkv[0][:16], qkv[1][:16], [x, x, x], asking),
        (x, x, qkv[0][:16], qkv[1][:16], [], asking[:, 1:]),
        (x, x, qkv[0][:16], qkv[1][:16], [], asking.float()),
    ):
        with pytest.raises(ValueError, match='the operator takes'):
            op(*wrong)
    for wrong in (
        (x, *norm, 1e-5, qkv[0][:16], qkv[1], None, None, asking, asking),
        (x, *norm, 1e-5, *qkv, torch.rand(5, 8), torch.rand(5), asking, asking),
        (x, *norm, 1e-5, *qkv, None, None, asking, asking[:, 1:]),
        (x, norm[0][1:], norm[1], 1e-5, *qkv, None, None, asking, asking),
    ):
        with pytest.raises(ValueError, match='the operator takes'):
            torch.ops.ppsr.norm_linear_some(*wrong)
