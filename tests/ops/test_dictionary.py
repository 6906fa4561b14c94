"""Attention to a dictionary and its refinement: the compiled kernels against the definition in float64."""

import pytest
import torch
from layer_kernels import assert_close, kernel_and_definition, needs_native, random, randomise
from torch import nn

from ppsr.ops import use_backend
from ppsr.ops.dictionary import Similarity, dictionary_attention, dictionary_refinement


def dictionary(n, rank, entries, channels, batch=2):
    q, k, v = random(batch, n, rank), random(batch, entries, rank, seed=1), random(batch, entries, channels, seed=2)
    x = random(batch, n, channels, seed=3)
    norm = randomise(nn.InstanceNorm1d(entries, affine=True))

    def run(dtype, norm):
        out, category, similarity = dictionary_attention(q.to(dtype), k.to(dtype), v.to(dtype))
        assert (similarity.matrix is None) == (dtype == torch.float32)
        return out, category, dictionary_refinement(similarity, x.to(dtype), norm)

    return run, norm


# the last has more tokens than 256 tasks of the usual size
@needs_native
@pytest.mark.parametrize(
    'n, rank, entries, channels',
    [
        (1500, 8, 64, 48),
        (1000, 12, 128, 48),
        (37, 5, 20, 36),
        (2, 8, 64, 48),
        (5, 8, 1, 24),
        (300, 4, 33, 7),
        (270_001, 2, 3, 2),
    ],
)
def test_dictionary(target, n, rank, entries, channels):
    actual, expected = kernel_and_definition(*dictionary(n, rank, entries, channels))
    assert_close(actual[0], expected[0])
    assert (actual[1] == expected[1]).double().mean() > 0.999  # a tie within rounding may fall either way
    assert_close(actual[2], expected[2], 1e-5)


@pytest.mark.parametrize('backend', ['torch', pytest.param('native', marks=needs_native)])
def test_one_dictionary_for_all_images(backend):
    q, k, v = random(3, 40, 12).float(), random(128, 12, seed=1).float(), random(128, 48, seed=2).float()
    norm = nn.InstanceNorm1d(128, affine=True)
    with torch.no_grad(), use_backend(backend):
        out, category, similarity = dictionary_attention(q, k, v)
        *expected, expected_similarity = dictionary_attention(q, k.expand(3, -1, -1), v.expand(3, -1, -1))
        refined, expected_refined = (dictionary_refinement(s, out, norm) for s in (similarity, expected_similarity))
    assert torch.equal(category, expected[1]) and torch.allclose(out, expected[0], atol=1e-6)
    assert torch.allclose(refined, expected_refined, atol=1e-5)


@needs_native
@pytest.mark.parametrize('spread', [0.0, 1e-3, 1e-1])
def test_refinement_of_nearly_equal_tokens(target, spread):
    """A variance much smaller than the squared mean is not lost in rounding; no variance at all: the mean of x."""
    q = torch.ones(1, 3000, 4, dtype=torch.float64) + spread * random(1, 3000, 4)
    k, x = torch.eye(4, dtype=torch.float64)[None] * torch.tensor([9.0, 1, 1, 1])[:, None], random(1, 3000, 16)
    norm = randomise(nn.InstanceNorm1d(4, affine=True))

    def run(dtype, norm):
        similarity = dictionary_attention(q.to(dtype), k.to(dtype), x[:, :4].to(dtype))[2]
        return dictionary_refinement(similarity, x.to(dtype), norm)

    actual, expected = kernel_and_definition(run, norm)
    assert_close(actual, expected, 2e-5)
    if spread == 0:
        assert_close(actual, x.mean(1, keepdim=True).expand_as(actual))


@needs_native
def test_refinement_of_many_equal_tokens(target):
    """A flat image: sums over very many tokens do not drift; nor do they where the first token is unlike the others."""
    n = 300_000
    q, x = torch.ones(1, n, 2, dtype=torch.float64), torch.full((1, n, 16), 0.3, dtype=torch.float64)
    k, norm = random(1, 5, 2), randomise(nn.InstanceNorm1d(5, affine=True))
    q[0, 0, 0], x[0, 0] = -50, 0.5

    def run(dtype, norm):
        similarity = dictionary_attention(q.to(dtype), k.to(dtype), random(1, 5, 3).to(dtype))[2]
        return dictionary_refinement(similarity, x.to(dtype), norm)

    assert_close(*kernel_and_definition(run, norm), bound=2e-6)


@needs_native
@pytest.mark.parametrize('where', ['q', 'k', 'v', 'x', 'weight', 'bias'])
def test_nan_in_the_dictionary(target, where):
    tensors = {'q': random(1, 100, 8), 'k': random(1, 6, 8), 'v': random(1, 6, 48), 'x': random(1, 100, 48)}
    norm = nn.InstanceNorm1d(6, affine=True).double()
    tensors |= {'weight': norm.weight.data, 'bias': norm.bias.data}
    tensors[where].view(-1)[5] = float('nan')

    def run(dtype, norm):
        out, _, similarity = dictionary_attention(*(tensors[name].to(dtype) for name in 'qkv'))
        return out.isnan(), dictionary_refinement(similarity, tensors['x'].to(dtype), norm).isnan()

    actual, expected = kernel_and_definition(run, norm)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))
    assert any(a.any() for a in actual)


def test_similarity_is_kept_for_gradients():
    q, k, v = (t.requires_grad_() for t in (random(1, 5, 3), random(1, 4, 3), random(1, 4, 6)))
    out, _, similarity = dictionary_attention(q, k, v)
    assert isinstance(similarity, Similarity)
    assert torch.allclose(similarity.matrix.sum(-1), torch.ones(1, 5, dtype=torch.float64))
    norm = nn.InstanceNorm1d(4, affine=True).double()

    def both_results(q, k, v):
        out, _, similarity = dictionary_attention(q, k, v)
        return out, dictionary_refinement(similarity, out, norm)

    assert torch.autograd.gradcheck(both_results, (q, k, v))
