"""Attention in parts, which the torch backends of both operators share."""

import pytest
import torch
from attention_cases import assert_close

from ppsr.ops import torch_attention


@pytest.mark.parametrize('with_bias', [False, True])
def test_attention_of_devices_without_a_fused_kernel(monkeypatch, with_bias):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, 2, n, 12, generator=g, dtype=torch.float64) for n in (7, 9, 9))
    bias = torch.randn(2, 7, 9, generator=g, dtype=torch.float64) if with_bias else None
    monkeypatch.setattr(torch_attention, '_DEVICE_ELEMENTS', 2 * 2 * 7 * 9)
    want = torch_attention.attention(q, k, v, 0.3, bias)
    got = torch_attention.attention_in_parts(q, k, v, torch.tensor([0.3], dtype=torch.float64), bias)
    assert_close(dict(zip(['out', 'lse'], got)), dict(zip(['out', 'lse'], want)), 1e-12)
