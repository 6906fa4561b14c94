"""The compiled kernels of window attention, on every instruction set, against the float64 definition."""

import itertools

import numpy as np
import pytest
import torch
from attention_kernels import assert_close, run_windows, window_inputs

from ppsr.ops import native
from ppsr.ops.window_attention import reference as window_reference

if native.unavailable_reason():
    pytest.skip(native.unavailable_reason(), allow_module_level=True)

from ppsr.ops.window_attention import native as window_native

# ws, (H, W), shift, heads, head dim, B
WINDOWS = [
    pytest.param(4, (8, 12), 0, 2, 12, 2, id='ws4-12x8-dim12-batch2'),
    pytest.param(4, (8, 12), 1, 2, 12, 2, id='ws4-shift1-batch2'),
    pytest.param(7, (14, 7), 3, 3, 5, 1, id='ws7-half-dim5'),
    pytest.param(8, (16, 24), 4, 4, 16, 2, id='ws8-half-dim16-batch2'),
    pytest.param(16, (16, 32), 8, 4, 12, 1, id='ws16-half-dim12'),
    pytest.param(16, (16, 16), 15, 1, 64, 1, id='ws16-shift15-one-window-dim64'),
    pytest.param(1, (3, 2), 0, 1, 3, 1, id='ws1'),
]


@pytest.mark.parametrize('ws, size, shift, heads, dim, batch', WINDOWS)
def test_window_attention_is_the_definition(target, ws, size, shift, heads, dim, batch):
    inputs = window_inputs(ws, size, heads, dim, batch)
    actual = run_windows(window_native, *inputs, heads, ws, shift)
    expected = run_windows(window_reference, *(x.double() for x in inputs), heads, ws, shift)
    for name, a, e in zip(('out', 'lse', 'grad_qkv', 'grad_table'), actual, expected):
        assert_close(name, a, e, floor=1.0)


def windows_by_definition(qkv, table, grad, heads, ws):
    """The formulas in NumPy, whose arithmetic with what is not finite is that of IEEE 754; as `run_windows`, no lse."""
    maps = qkv[0].double().numpy(), grad[0].double().numpy()
    table, side = table.double().numpy(), np.arange(ws)
    offset = side[:, None] - side + ws - 1
    index = (offset[:, None, :, None] * (2 * ws - 1) + offset[None, :, None, :]).reshape(ws * ws, ws * ws)
    out, grad_qkv, grad_table = np.zeros_like(maps[1]), np.zeros_like(maps[0]), np.zeros_like(table)
    height, width, channels = out.shape
    dim = channels // heads
    for y, x, h in itertools.product(range(0, height, ws), range(0, width, ws), range(heads)):

        def rows(map_, part=0, y=y, x=x, h=h):
            return map_[y : y + ws, x : x + ws, part * channels + h * dim : part * channels + (h + 1) * dim]

        q, k, v = (rows(maps[0], part).reshape(-1, dim) for part in range(3))
        do = rows(maps[1]).reshape(-1, dim)
        logits = np.einsum('qd,kd->qk', q, k) * dim**-0.5 + table[index, h]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        o = np.einsum('qk,kd->qd', p, v)
        ds = p * (np.einsum('qd,kd->qk', do, v) - (do * o).sum(1, keepdims=True))
        grads = np.einsum('qk,kd->qd', ds, k), np.einsum('qk,qd->kd', ds, q), np.einsum('qk,qd->kd', p, do)
        for part, (g, scale) in enumerate(zip(grads, (dim**-0.5, dim**-0.5, 1))):
            rows(grad_qkv, part)[:] = (g * scale).reshape(ws, ws, dim)
        rows(out)[:] = o.reshape(ws, ws, dim)
        np.add.at(grad_table[:, h], index, ds)
    return (torch.from_numpy(result) for result in (out[None], grad_qkv[None], grad_table))


@pytest.mark.filterwarnings('ignore:invalid value encountered')
@pytest.mark.parametrize('where', ['q', 'k', 'v', None])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
def test_nan_and_infinity_go_where_the_formulas_send_them(target, value, where):
    qkv, table, grad = window_inputs(4, (8, 8), 2, 4, 1)
    if where:
        qkv[0, 2, 5, 'qkv'.index(where) * 8 + 5] = value  # second head, second window
    actual = run_windows(window_native, qkv, table, grad, 2, 4, 0)
    expected = windows_by_definition(qkv, table, grad, 2, 4)
    for name, a, e in zip(('out', 'grad_qkv', 'grad_table'), actual[:1] + actual[2:], expected):
        assert e.isfinite().all() == (where is None)
        assert torch.equal(a.isfinite(), e.isfinite()), name
        torch.testing.assert_close(a[a.isfinite()].double(), e[a.isfinite()], msg=name, rtol=1e-4, atol=1e-4)


def test_a_bias_of_minus_infinity_masks_a_pair(target):
    qkv, table, grad = window_inputs(4, (4, 4), 1, 4, 1)
    table[:24] = float('-inf')  # no key above and none to the right in a row above: the first query keeps the others
    actual = run_windows(window_native, qkv, table, grad, 1, 4, 0)
    expected = run_windows(window_reference, *(x.double() for x in (qkv, table, grad)), 1, 4, 0)
    for name, a, e in zip(('out', 'lse', 'grad_qkv', 'grad_table'), actual, expected):
        torch.testing.assert_close(a.double(), e, msg=name, rtol=1e-4, atol=1e-5)


def test_large_logits_neither_overflow_nor_slow_down_into_denormals(target):
    qkv, table, grad = window_inputs(8, (8, 8), 1, 12, 1)
    qkv[..., :12] *= 1e3
    actual = run_windows(window_native, qkv, table, grad, 1, 8, 0)
    expected = run_windows(window_reference, *(x.double() for x in (qkv, table, grad)), 1, 8, 0)
    assert_close('out', actual[0], expected[0], floor=100.0)  # logits of 5e3, rounded to 5e-4
    tiny = torch.tensor([1e-39])
    assert (tiny * 0.5 > 0).all(), 'denormal numbers still work in this thread'
