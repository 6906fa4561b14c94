"""Both attentions in one graph: torch.compile, checkpointing, fake tensors, threads, one backend after another."""

import importlib

import pytest
import torch
from attention_cases import (
    BACKENDS,
    FAST,
    assert_close,
    category_inputs,
    run_category,
    run_window,
    window_inputs,
    with_gradients,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ppsr.ops import category_attention, torch_attention, use_backend, window_attention


def both(x, scale, table, category, pure):
    """Both operators and something in between."""
    y = window_attention(x, table, num_heads=2, window_size=4, shift=2)
    z = category_attention(
        x.flatten(1, 2) * 2, category, scale.exp(), num_heads=2, category_size=16, pure=pure, compensation='value'
    )
    return torch.nn.functional.gelu(y.flatten(1, 2) + z)


def both_inputs():
    g = torch.Generator().manual_seed(0)
    x, table = torch.randn(2, 8, 8, 24, generator=g), torch.randn(49, 2, generator=g)
    return x, torch.zeros(1), table, torch.randint(0, 5, (2, 64), generator=g), torch.rand(2, 64, generator=g) < 0.3


@pytest.mark.parametrize('second', BACKENDS)
@pytest.mark.parametrize('first', BACKENDS)
def test_a_backward_takes_what_any_forward_gave(first, second):
    case, window = (2, 63, 2, 12, 16, 5, 0.3), (2, 8, 12, 2, 4, 4, 2)
    qkv, scale, category, pure = category_inputs(case)
    x, table = window_inputs(window)
    want = run_category('reference', case, qkv, scale, category, pure)['gradient 0']
    want_window = run_window('reference', window, x, table)['gradient 0']
    qkv.requires_grad_(), x.requires_grad_()
    with use_backend(first):
        out = category_attention(qkv, category, scale, num_heads=2, category_size=16, pure=pure)
        map_ = window_attention(x, table, num_heads=2, window_size=4, shift=2)
    with use_backend(second):
        weights = [
            torch.randn(o.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).float()
            for o in (out, map_)
        ]
        got = torch.autograd.grad([out, map_], [qkv, x], weights)
    assert_close({'qkv': got[0], 'map': got[1]}, {'qkv': want, 'map': want_window}, 1e-5)


def test_parts_of_any_size_give_the_same(monkeypatch):
    case, window = (2, 150, 2, 4, 16, 5, 0.2), (3, 24, 16, 2, 4, 4, 1)
    inputs, window_in = category_inputs(case, torch.float64), window_inputs(window, torch.float64)
    want, want_window = run_category('torch', case, *inputs), run_window('torch', window, *window_in)
    monkeypatch.setattr(importlib.import_module('ppsr.ops.category_attention.torch'), '_TOKENS', 48)
    monkeypatch.setattr(torch_attention, '_CPU_ELEMENTS', 3 * 2 * 16 * 16)
    for tokens in (1, 100, 1000):
        monkeypatch.setattr(importlib.import_module('ppsr.ops.window_attention.torch'), '_TOKENS', tokens)
        assert_close(run_window('torch', window, *window_in), want_window, 1e-12)
    assert_close(run_category('torch', case, *inputs), want, 1e-12)


@pytest.mark.parametrize('backend', FAST)
def test_two_threads_give_what_one_gives(backend):
    case, window = (2, 150, 2, 4, 16, 5, 0.2), (2, 16, 24, 2, 4, 8, 4)
    inputs, window_in = category_inputs(case), window_inputs(window)
    want, want_window = run_category(backend, case, *inputs), run_window(backend, window, *window_in)
    torch.set_num_threads(2)
    try:
        got, got_window = run_category(backend, case, *inputs), run_window(backend, window, *window_in)
    finally:
        torch.set_num_threads(1)
    assert_close(got, want, 1e-6)
    assert_close(got_window, want_window, 1e-6)


@pytest.mark.parametrize('backend', BACKENDS)
def test_compile_without_graph_break(backend):
    *floats, category, pure = both_inputs()
    compiled = torch.compile(both, fullgraph=True, backend='aot_eager')
    with use_backend(backend):
        want = with_gradients(lambda *a: both(*a, category, pure), *floats)
        got = with_gradients(lambda *a: compiled(*a, category, pure), *floats)
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('backend', BACKENDS)
def test_activation_checkpointing(backend, reentrant):
    *floats, category, pure = both_inputs()
    with use_backend(backend):
        want = with_gradients(lambda *a: both(*a, category, pure), *floats)
        got = with_gradients(lambda *a: checkpoint(both, *a, category, pure, use_reentrant=reentrant), *floats)
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize('backend', BACKENDS)
def test_fake_results_look_like_real_ones(backend, dtype):
    if backend == 'native' and dtype != torch.float32:
        pytest.skip('the compiled kernels take float32')
    *floats, category, pure = both_inputs()
    x, scale, table = (t.to(dtype) for t in floats)
    tokens = x.flatten(1, 2)

    def run(x, tokens, scale, table, category, pure):
        first = torch.ops.ppsr.category_attention(tokens, category, pure, scale, 2, 16, True)
        second = torch.ops.ppsr.window_attention(x, table, None, 2, 4, 2)
        grad = torch.ops.ppsr.category_attention_backward(first[0], tokens, *first, scale, 2, 16, True)
        return (
            *first,
            *second,
            *grad,
            *torch.ops.ppsr.window_attention_backward(second[0], x, *second, table, None, 2, 4, 2),
        )

    arguments = x, tokens, scale, table, category, pure
    with use_backend(backend):
        real = run(*arguments)
    with FakeTensorMode() as mode:
        fake = run(*(mode.from_tensor(t) for t in arguments))
    meta = run(*(t.to('meta') for t in arguments))
    for i, (r, f, m) in enumerate(zip(real, fake, meta, strict=True)):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), f'fake result {i}'
        assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride()), f'meta result {i}'
