"""Window attention: values by hand, the oracle, every backend, gradients, and one operator for PyTorch."""

import pytest
import torch
from attention_cases import (
    BACKENDS,
    FAST,
    HALF,
    WIDE,
    WINDOW_CASES,
    assert_close,
    assert_error_within_twice_the_plain_one,
    errors_to,
    run_window,
    weighted_attention,
    window_id,
    window_inputs,
    with_gradients,
)
from flop_counter import flop_counter
from hypothesis import given, settings
from hypothesis import strategies as st

from ppsr.ops import use_backend, window_attention


def mask(qkv, share, seed=5):
    """(B, H, W) bool, `share` of it pure."""
    return torch.rand(qkv.shape[:3], generator=torch.Generator().manual_seed(seed)) < share


def window_oracle(qkv, table, num_heads, ws, shift):
    _, height, width, _ = qkv.shape
    y, x = (i.flatten() for i in torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij'))
    # the grid lines of the shifted windows, on the map where it lies; −1 is the strip before the first line
    tile = torch.stack([(y - shift).div(ws, rounding_mode='floor'), (x - shift).div(ws, rounding_mode='floor')])
    together = (tile[:, :, None] == tile[:, None, :]).all(0)
    dy, dx = ((i[:, None] - i[None, :]).clamp(1 - ws, ws - 1) + ws - 1 for i in (y, x))
    bias = table[dy * (2 * ws - 1) + dx].permute(2, 0, 1).masked_fill(~together, float('-inf'))
    images = []
    for image in qkv:
        q, k, v = image.flatten(0, 1).unflatten(1, (3, num_heads, -1)).unbind(1)
        images.append(weighted_attention(q, k, v, q.shape[-1] ** -0.5, bias).unflatten(0, (height, width)))
    return torch.stack(images)


@pytest.mark.parametrize('backend', BACKENDS)
def test_window_attention_by_hand(backend):
    qkv = torch.zeros(1, 2, 2, 3)
    qkv[..., 2] = torch.tensor([[0.0, 8.0], [16.0, 24.0]])
    table = torch.zeros(9, 1)
    table[5] = torch.tensor(5.0).log()  # Δy = 0, Δx = +1: the query lies right of the key
    with use_backend(backend):
        out = window_attention(qkv, table, num_heads=1, window_size=2)
        alone = window_attention(qkv, table, num_heads=1, window_size=2, shift=1)
    right = [(5 * 0.0 + 8 + 16 + 24) / 8, (0.0 + 8 + 5 * 16 + 24) / 8]
    torch.testing.assert_close(out[0, ..., 0], torch.tensor([[12.0, right[0]], [12.0, right[1]]]))
    # shifted by one, each of the four tokens comes from another corner of the map and is alone
    torch.testing.assert_close(alone, qkv[..., 2:])


@pytest.mark.parametrize('case', WINDOW_CASES, ids=window_id)
@pytest.mark.parametrize('backend', WIDE)
def test_window_attention_float64(backend, case):
    inputs = window_inputs(case, torch.float64)
    want = with_gradients(lambda q, t: window_oracle(q, t, case[3], *case[5:]), *inputs)
    assert_close(run_window(backend, case, *inputs), want, 1e-11)


@pytest.mark.parametrize('case', WINDOW_CASES, ids=window_id)
@pytest.mark.parametrize('backend', FAST)
def test_window_attention_float32(backend, case):
    qkv, table = window_inputs(case)
    want = run_window('reference', case, qkv.double(), table.double())
    assert_close(run_window(backend, case, qkv, table), want, 2e-5)


@pytest.mark.parametrize('dtype', HALF, ids=str)
@pytest.mark.parametrize('case', [WINDOW_CASES[1], WINDOW_CASES[3], WINDOW_CASES[4]], ids=window_id)
def test_window_attention_in_half_precision(case, dtype):
    qkv, table = window_inputs(case, dtype)
    exact = run_window('reference', case, qkv.double(), table.double())
    errors = {b: [errors_to(exact, run_window(b, case, qkv, table), dtype)] for b in ('torch', 'reference')}
    assert_error_within_twice_the_plain_one(errors)


@settings(max_examples=15)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.data())
@pytest.mark.parametrize('backend', FAST)
def test_any_map_and_shift(backend, batch, rows, columns, ws, data):
    case = (batch, rows * ws, columns * ws, 2, 3, ws, data.draw(st.integers(0, ws - 1)))
    qkv, table = window_inputs(case, seed=rows)
    want = with_gradients(lambda q, t: window_oracle(q, t, 2, *case[5:]), qkv.double(), table.double())
    assert_close(run_window(backend, case, qkv, table), want, 2e-5)


@pytest.mark.parametrize('backend', WIDE)
@pytest.mark.parametrize('shift', [0, 1])
def test_window_gradcheck(backend, shift):
    qkv, table = window_inputs((2, 4, 2, 2, 2, 2, shift), torch.float64)
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda q, t: window_attention(q, t, num_heads=2, window_size=2, shift=shift),
            (qkv.requires_grad_(), table.requires_grad_()),
            fast_mode=True,
        )


@pytest.mark.parametrize('backend', BACKENDS)
def test_window_batch_equals_single_images(backend):
    case = (3, 8, 12, 2, 4, 4, 2)
    qkv, table = window_inputs(case)
    whole = run_window(backend, case, qkv, table)
    for b in range(3):
        single = run_window(backend, case, qkv[b : b + 1], table)
        torch.testing.assert_close(whole['out'][b], single['out'][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize('backend', BACKENDS)
def test_non_contiguous_map(backend):
    case = (2, 8, 12, 2, 4, 4, 2)
    qkv, table = window_inputs(case)
    want = run_window(backend, case, qkv, table)
    with use_backend(backend):
        x = qkv.permute(0, 3, 1, 2).contiguous().requires_grad_()
        t = table.t().contiguous().requires_grad_()
        out = window_attention(x.permute(0, 2, 3, 1), t.t(), num_heads=2, window_size=4, shift=2)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).float()
        grads = torch.autograd.grad(out, (x, t), weight)
    got = {'out': out.detach(), 'gradient 0': grads[0].permute(0, 2, 3, 1), 'gradient 1': grads[1].t()}
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize('backend', BACKENDS)
def test_the_bias_follows_its_table(backend):
    # BasicSR's moving average writes through .data, which leaves the version of a parameter as it was
    qkv, table = window_inputs((1, 4, 4, 1, 2, 4, 0))
    table = torch.nn.Parameter(table)
    with use_backend(backend), torch.no_grad():
        window_attention(qkv, table, num_heads=1, window_size=4)
        table.data.mul_(-1.0)
        got = window_attention(qkv, table, num_heads=1, window_size=4)
    torch.testing.assert_close(got, window_oracle(qkv, table.detach(), 1, 4, 0))


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('shift', [0, 1])
@pytest.mark.parametrize('share', [None, 0.4])
def test_window_opcheck(backend, shift, share):
    qkv, table = window_inputs((2, 4, 4, 2, 4, 2, shift))
    pure = None if share is None else mask(qkv, share)
    with use_backend(backend):
        arguments = (qkv.requires_grad_(), table.requires_grad_(), pure, 2, 2, shift)
        torch.library.opcheck(torch.ops.ppsr.window_attention.default, arguments)
        qkv, table = qkv.detach(), table.detach()
        out, lse = torch.ops.ppsr.window_attention(qkv, table, pure, 2, 2, shift)
        arguments = (torch.randn_like(out), qkv, out, lse, table, pure, 2, 2, shift)
        torch.library.opcheck(torch.ops.ppsr.window_attention_backward.default, arguments)


@pytest.mark.parametrize('shift', [0, 1])
def test_window_flops(shift):
    qkv, table = torch.randn(2, 4, 6, 18, requires_grad=True), torch.zeros(9, 3)
    expected = 2 * 2 * (2 * 4 * 6) * 4 * 6  # every token counts its window of 2·2, masked or not, as the papers do
    with flop_counter() as forward:
        out = window_attention(qkv, table, num_heads=3, window_size=2, shift=shift)
    assert forward.get_total_flops() == expected
    with flop_counter() as backward:
        out.sum().backward()
    assert backward.get_total_flops() == expected * 5 // 2


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'qkv': torch.zeros(4, 4, 12)}, 'qkv must be floating and'),
        ({'qkv': torch.zeros(1, 4, 4, 10)}, 'C a multiple of num_heads=2'),
        ({'qkv': torch.zeros(0, 4, 4, 12)}, 'none of them 0'),
        ({'qkv': torch.zeros(1, 4, 5, 12)}, r'H and W must be multiples of window_size=2, got \(4, 5\)'),
        ({'bias_table': torch.zeros(8, 2)}, r'bias_table must be floating \(9, 2\)'),
        ({'bias_table': torch.zeros(9, 2, device='meta')}, 'bias_table must be .* on cpu'),
        ({'shift': 2}, r'shift must lie in \[0, window_size=2\), got 2'),
        ({'shift': -1}, 'shift must lie in'),
        ({'window_size': 0}, 'window_size must be at least 1'),
        ({'pure': torch.zeros(1, 16, dtype=torch.bool)}, r'pure must be bool \(1, 4, 4\) on cpu'),
        ({'pure': torch.zeros(1, 4, 4)}, 'pure must be bool .* got torch.float32'),
    ],
)
def test_window_argument_errors(change, message):
    arguments = {'qkv': torch.zeros(1, 4, 4, 12), 'bias_table': torch.zeros(9, 2), 'num_heads': 2, 'window_size': 2}
    window_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        window_attention(**(arguments | change))


# ---------------------------------------------------------------------------------------------------------------------
# Pure tokens


@pytest.mark.parametrize('share', [0.1, 0.6, 0.95])
@pytest.mark.parametrize('case', WINDOW_CASES, ids=window_id)
@pytest.mark.parametrize('backend', WIDE)
def test_pure_tokens_ask_nothing_float64(backend, case, share):
    qkv, table = window_inputs(case, torch.float64)
    pure = mask(qkv, share)
    want = with_gradients(lambda q, t: window_oracle(q, t, case[3], *case[5:]) * ~pure[..., None], qkv, table)
    assert_close(run_window(backend, case, qkv, table, pure), want, 1e-11)


@pytest.mark.skipif('native' not in BACKENDS, reason='the kernels were not built')
@pytest.mark.parametrize('share', [0.1, 0.6, 0.95, 'by row'])
@pytest.mark.parametrize('case', WINDOW_CASES, ids=window_id)
def test_pure_tokens_ask_nothing_in_the_kernels(target, case, share):
    qkv, table = window_inputs(case)
    if share == 'by row':  # blocks of queries that all ask, that nearly all ask, some, none: each is treated otherwise
        share = torch.tensor([0, 0.1, 0.7, 0.3, 1]).repeat(qkv.shape[1])[: qkv.shape[1], None]
    pure = mask(qkv, share)
    want = run_window('reference', case, qkv.double(), table.double(), pure)
    assert_close(run_window('native', case, qkv, table, pure), want, 2e-5)


@pytest.mark.parametrize('backend', WIDE)
@pytest.mark.parametrize('shift', [0, 1])
def test_gradcheck_with_pure_tokens(backend, shift):
    qkv, table = window_inputs((2, 4, 2, 2, 2, 2, shift), torch.float64)
    pure = mask(qkv, 0.5)
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda q, t: window_attention(q, t, num_heads=2, window_size=2, shift=shift, pure=pure),
            (qkv.requires_grad_(), table.requires_grad_()),
            fast_mode=True,
        )


@pytest.mark.parametrize('backend', BACKENDS)
def test_images_of_unlike_purity(backend):
    """Nothing pure: the dense result bit for bit; all pure: zeros, and no gradient; a batch: each as if alone."""
    case = (3, 16, 24, 2, 4, 8, 4)
    qkv, table = window_inputs(case)
    pure = mask(qkv, 0.5)
    pure[0], pure[2] = False, True
    whole, dense = run_window(backend, case, qkv, table, pure), run_window(backend, case, qkv, table)
    nothing = run_window(backend, case, qkv, table, torch.zeros_like(pure))
    assert all(torch.equal(nothing[name], dense[name]) for name in dense)
    assert torch.equal(whole['out'][0], dense['out'][0])
    assert not whole['out'][2].any() and not whole['gradient 0'][2].any()
    torch.testing.assert_close(whole['out'][1], dense['out'][1] * ~pure[1, ..., None], rtol=0, atol=1e-6)


@pytest.mark.parametrize('backend', BACKENDS)
def test_without_filling_the_others_get_the_same(backend):
    case = (2, 16, 24, 2, 4, 8, 4)
    qkv, table = window_inputs(case)
    pure = mask(qkv, 0.5)
    with use_backend(backend):
        sizes = dict(num_heads=2, window_size=8, shift=4, pure=pure)
        filled, not_filled = (window_attention(qkv, table, fill=fill, **sizes) for fill in (True, False))
    assert torch.equal(filled[~pure], not_filled[~pure])


@pytest.mark.parametrize('backend', BACKENDS)
def test_the_query_of_a_pure_token_reaches_nobody(backend):
    case = (1, 16, 16, 2, 4, 8, 4)
    qkv, table = window_inputs(case)
    pure = mask(qkv, 0.5)
    other = qkv.clone()
    other[..., :8] = torch.where(pure[..., None], other.new_tensor(float('nan')), other[..., :8])
    before, after = (run_window(backend, case, x, table, pure) for x in (qkv, other))
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert not before['gradient 0'][..., :8][pure].any()
    assert before['gradient 0'][..., 16:][pure].any(), 'a pure token is still a value'


@pytest.mark.parametrize('shift', [0, 1])
@pytest.mark.parametrize('share', [0.0, 0.5, 1.1])
def test_window_flops_of_those_that_ask(shift, share):
    qkv, table = torch.randn(2, 4, 6, 18, requires_grad=True), torch.zeros(9, 3)
    pure = mask(qkv, share)
    expected = 2 * 2 * (~pure).sum().item() * 4 * 6
    with flop_counter() as forward:
        out = window_attention(qkv, table, num_heads=3, window_size=2, shift=shift, pure=pure)
    assert forward.get_total_flops() == expected
    with flop_counter() as backward:
        out.sum().backward()
    assert backward.get_total_flops() == expected * 5 // 2
