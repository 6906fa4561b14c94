"""What runs an operator between the attentions twice: by the kernels in float32, by its definition in float64."""

import pytest
import torch

from ppsr.ops import native, use_backend

needs_native = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomise(module):
    g = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64, generator=g)
    return module


def kernel_and_definition(function, *modules):
    """Results of function(dtype, *modules): the kernels in float32, the definition in float64."""
    results = []
    for dtype, backend in ((torch.float32, 'native'), (torch.float64, 'torch')):
        with torch.no_grad(), use_backend(backend):
            results.append(function(dtype, *(module.to(dtype) for module in modules)))
    return results


def assert_close(actual, expected, bound=3e-6):
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error <= bound * max(1.0, expected.abs().max().item()), error


# tokens, channels, outputs: whole and broken panels, vectors, chunks and tasks
SIZES = [(1, 48, 48), (61, 48, 144), (1000, 48, 48), (500, 36, 72), (97, 24, 5), (53, 7, 3), (49, 17, 33)]
