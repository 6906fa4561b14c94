"""Which backend runs: by itself, by name, and what is said where it cannot."""

import pytest
import torch
from attention_cases import BACKENDS

from ppsr.errors import UserError
from ppsr.ops import category_attention, dispatch, use_backend


@pytest.fixture
def no_environment(monkeypatch):
    monkeypatch.delenv('PPSR_BACKEND', raising=False)


def test_environment_chooses(monkeypatch):
    monkeypatch.setenv('PPSR_BACKEND', 'reference')
    assert dispatch.choose(torch.zeros(1)) == 'reference'
    assert dispatch.select('window_attention', torch.zeros(1)).__name__ == 'ppsr.ops.window_attention.reference'
    with use_backend('torch'):  # code wins over the environment
        assert dispatch.choose(torch.zeros(1)) == 'torch'
        with use_backend(None):
            assert dispatch.choose(torch.zeros(1)) == 'reference'
    assert dispatch.choose(torch.zeros(1)) == 'reference'


def test_use_backend_ends_with_its_block(no_environment):
    before = dispatch.choose(torch.zeros(1))
    with pytest.raises(ZeroDivisionError), use_backend('reference'):
        raise ZeroDivisionError
    assert dispatch.choose(torch.zeros(1)) == before


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_automatic_choice_takes_any_dtype(no_environment, dtype):
    name = dispatch.choose(torch.zeros(1, dtype=dtype))
    assert name == ('native' if 'native' in BACKENDS and dtype == torch.float32 else 'torch')


def test_unknown_backend(monkeypatch, no_environment):
    with pytest.raises(UserError, match="'cuda' is not a backend; choose one of native, triton, torch, reference"):
        use_backend('cuda').__enter__()
    monkeypatch.setenv('PPSR_BACKEND', 'cuda')
    with pytest.raises(UserError, match="PPSR_BACKEND='cuda' is not a backend"):
        category_attention(
            torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), torch.ones(1), num_heads=1, category_size=2
        )


def test_backend_that_cannot_run_says_why(monkeypatch, no_environment):
    monkeypatch.setattr(dispatch, 'available', {'native': None, 'triton': 'no CUDA device is visible'}.get)
    with use_backend('native'), pytest.raises(UserError, match='it takes float32 on the CPU, not float64 on cpu'):
        dispatch.choose(torch.zeros(1, dtype=torch.float64))
    monkeypatch.setenv('PPSR_BACKEND', 'triton')
    with pytest.raises(UserError, match="backend 'triton' was asked for .* no CUDA device is visible"):
        dispatch.choose(torch.zeros(1))
