"""What stands in for attention: the compiled kernel against the definition in float64, whom it leaves alone."""

import pytest
import torch
from layer_kernels import assert_close, kernel_and_definition, needs_native, random, randomise
from torch import nn

from ppsr.ops import use_backend
from ppsr.ops.stand_in import linear_stand_in, mean5


def case(h, w, c, share, seed=0):
    g = torch.Generator().manual_seed(seed)
    pure = torch.rand(2, h, w, generator=g) < share
    return random(2, h, w, c), random(2, h, w, c, seed=1) * 3 + 1, pure


def run(dtype, norm, linear, out, x, pure, *add, **sees):
    add = [a.to(dtype) for a in add]
    return linear_stand_in(out.to(dtype), pure, x.to(dtype), norm, linear.weight, linear.bias, *add, **sees)


def test_mean_of_the_neighbourhood_that_there_is():
    x = torch.randn(1, 6, 7, 2, dtype=torch.float64)
    mean = mean5(x)
    for y, left, right in ((0, 0, 0), (3, 3, 3), (5, 6, 6), (1, 4, 4)):
        there = x[0, max(y - 2, 0) : y + 3, max(left - 2, 0) : right + 3]
        torch.testing.assert_close(mean[0, y, left], there.mean((0, 1)))


@needs_native
@pytest.mark.parametrize('share', [0.02, 0.5, 1])
@pytest.mark.parametrize('shape', [(32, 24, 48), (37, 61, 20), (3, 4, 7), (1, 1, 16), (2, 70, 33), (50, 1, 8)], ids=str)
def test_linear_stand_in(target, shape, share):
    modules = randomise(nn.LayerNorm(shape[-1], eps=1e-3)), randomise(nn.Linear(2 * shape[-1], shape[-1]))
    out, x, pure = case(*shape, share)
    pure[0, 0, 0] = True
    actual, expected = kernel_and_definition(lambda d, *m: run(d, *m, out.clone(), x, pure), *modules)
    assert_close(actual, expected)
    assert torch.equal(actual[~pure], out.float()[~pure])


@needs_native
@pytest.mark.parametrize('sees', [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize('additions', [0, 1, 2])
def test_what_it_sees_and_what_is_added(target, sees, additions):
    modules = randomise(nn.LayerNorm(20)), randomise(nn.Linear(sum(sees) * 20, 20))
    out, x, pure = case(19, 23, 20, 0.4)
    add = [random(2, 19, 23, 20, seed=seed) for seed in range(additions)]
    sees = dict(zip(('own', 'around'), sees))
    actual, expected = kernel_and_definition(lambda d, *m: run(d, *m, out.clone(), x, pure, *add, **sees), *modules)
    assert_close(actual, expected)
    assert torch.equal(actual[~pure], out.float()[~pure])


@needs_native
def test_bit_for_bit_the_same_for_any_number_of_threads_and_for_an_image_alone(target):
    modules = nn.LayerNorm(48), nn.Linear(96, 48)
    out, x, pure = case(70, 40, 48, 0.4)
    pure[:, :20] = pure[:, 50:] = False
    before, results = torch.get_num_threads(), []
    with torch.no_grad(), use_backend('native'):
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(run(torch.float32, *modules, out.clone(), x, pure))
        finally:
            torch.set_num_threads(before)
        alone = [run(torch.float32, *modules, out[i : i + 1].clone(), x[i : i + 1], pure[i : i + 1]) for i in (0, 1)]
    assert torch.equal(*results) and torch.equal(results[0], torch.cat(alone))


@needs_native
def test_registered_properly_and_refuses_what_does_not_fit():
    out, x, pure = case(9, 8, 16, 0.5)
    norm, linear = nn.LayerNorm(16), nn.Linear(32, 16)
    w = [p.detach() for p in (norm.weight, norm.bias, linear.weight, linear.bias)]
    op = torch.ops.ppsr.linear_stand_in
    torch.library.opcheck(op.default, (out.float(), x.float(), *w[:2], 1e-5, *w[2:], pure, True, True, [out.float()]))
    for wrong in (
        (out, x, *w[:2], 1e-5, *w[2:], pure),
        (out.float(), x.float()[:, :4], *w[:2], 1e-5, *w[2:], pure),
        (out.float(), x.float(), *w[:2], 1e-5, w[2][:, :16], w[3], pure),
        (out.float(), x.float(), *w[:2], 1e-5, *w[2:], pure[:1]),
        (out.float(), x.float(), w[0][:8], w[1], 1e-5, *w[2:], pure),
    ):
        with pytest.raises(ValueError, match='the operator takes'):
            op(*wrong, True, True, [])
    right = out.float(), x.float(), *w[:2], 1e-5, *w[2:], pure
    for wrong in ((True, False, []), (False, False, []), (True, True, 3 * [x.float()]), (True, True, [x.float()[:1]])):
        with pytest.raises(ValueError, match='the operator takes'):
            op(*right, *wrong)


@needs_native
def test_nan_stays_where_it_reaches(target):
    norm, linear = nn.LayerNorm(16), nn.Linear(32, 16)
    out, x, _ = case(9, 9, 16, 0)
    pure = torch.ones(2, 9, 9, dtype=torch.bool)
    pure[:, 4, 5] = False
    x[0, 4, 4, 3] = float('nan')
    with torch.no_grad(), use_backend('native'):
        found = run(torch.float32, norm, linear, out, x, pure).isnan().all(-1)
    reached = torch.zeros_like(pure)
    reached[0, 2:7, 2:7] = True
    assert torch.equal(found, reached & pure)
