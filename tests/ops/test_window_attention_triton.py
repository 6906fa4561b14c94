"""The Triton kernels of window attention: by Triton's interpreter against the float64 reference, and on a GPU."""

import pytest
import torch

import ppsr.ops
from ppsr.ops.window_attention import reference, window_attention

pytest.importorskip('triton', reason='triton is not installed')

DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}

# name: (images, height, width, heads, head dim, window, shift)
WINDOWS = {
    'no shift': (1, 6, 12, 1, 12, 6, 0),
    'two images, two heads': (2, 4, 8, 2, 5, 4, 2),
    'shift by one, blocks without a pair': (1, 9, 18, 1, 16, 9, 1),
    'side no power of two, one column of windows': (1, 14, 7, 1, 12, 7, 3),
    'windows of one': (1, 2, 2, 1, 5, 1, 0),
}


def _window_inputs(case, dtype, device='cpu'):
    images, height, width, heads, head_dim, size, shift = WINDOWS[case]
    random = torch.Generator().manual_seed(height * width)
    qkv = torch.randn(images, height, width, 3 * heads * head_dim, generator=random).to(dtype)
    table = torch.randn((2 * size - 1) ** 2, heads, generator=random)
    grad_out = torch.randn(images, height, width, heads * head_dim, generator=random).to(dtype)
    return *(x.to(device) for x in (qkv, table, grad_out)), heads, size, shift


def _window_errors(case, dtype, backend, device='cpu', share=None):
    """Largest error of every result of a backend against the float64 reference, forward and backward."""
    qkv, table, grad_out, *sizes = _window_inputs(case, dtype, device)
    pure = None if share is None else _window_mask(qkv, share)
    got = backend.forward(qkv, table, pure, *sizes)
    got += backend.backward(grad_out, qkv, *got, table, pure, *sizes)
    want = reference.forward(qkv.double(), table.double(), pure, *sizes)
    want += reference.backward(grad_out.double(), qkv.double(), *want, table.double(), pure, *sizes)
    names = ('out', 'lse', 'grad_qkv', 'grad_table')
    return {name: (g.double() - w).abs().max().item() for name, g, w in zip(names, got, want)}


def _window_mask(qkv, share):
    """A share of the tokens pure, the last images wholly."""
    pure = torch.rand(qkv.shape[:3], generator=torch.Generator().manual_seed(3)) < share
    pure[1:] = True
    return pure.to(qkv.device)


def _interpret_window(case, dtype, share=None):
    from ppsr.ops.window_attention import triton as backend

    return _window_errors(case, dtype, backend, share=share)


@pytest.mark.parametrize('share', [None, 0.0, 0.6], ids=['dense', 'nothing pure', 'some pure'])
@pytest.mark.parametrize('case', WINDOWS)
def test_window_attention_agrees_with_the_definition(interpreter, case, share):
    errors = interpreter(_interpret_window, case, torch.float32, share)
    assert all(error < 2e-5 for error in errors.values()), errors


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_window_attention_in_half_precision_errs_no_more_than_twice_as_much(interpreter, dtype):
    case, dtype = 'side no power of two, one column of windows', DTYPES[dtype]
    errors = interpreter(_interpret_window, case, dtype)
    plain = _window_errors(case, dtype, reference)
    for name, error in errors.items():
        assert error <= 2 * plain[name], (name, errors, plain)


def _window_operator():
    """opcheck, and results and gradients of the public function by the Triton backend and in float64."""
    qkv, table, grad_out, heads, size, shift = _window_inputs('windows of one', torch.float32)
    results = []
    for backend, dtype in (('triton', torch.float32), ('reference', torch.float64)):
        x, bias = qkv.to(dtype).requires_grad_(), table.to(dtype).requires_grad_()
        with ppsr.ops.use_backend(backend):
            out = window_attention(x, bias, num_heads=heads, window_size=size, shift=shift)
            results.append((out, *torch.autograd.grad(out, (x, bias), grad_out.to(dtype))))
            if backend == 'triton':
                checks = torch.library.opcheck(
                    torch.ops.ppsr.window_attention.default, (x, bias, None, heads, size, shift)
                )
    return checks, [tuple(x.detach().double() for x in result) for result in results]


def test_window_operator_with_autograd_and_opcheck(interpreter):
    checks, (got, want) = interpreter(_window_operator)
    assert checks and set(checks.values()) == {'SUCCESS'}
    for name, g, w in zip(('out', 'grad_qkv', 'grad_table'), got, want):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f'{name}: {text}')


# --- On a GPU --------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')


@needs_gpu
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('case', WINDOWS)
def test_window_attention_on_a_gpu(case, dtype):
    from ppsr.ops.window_attention import triton as backend

    errors = _window_errors(case, DTYPES[dtype], backend, 'cuda')
    plain = _window_errors(case, DTYPES[dtype], reference, 'cuda')
    for name, error in errors.items():
        assert error <= 2 * plain[name] + 1e-4, (name, errors, plain)
