"""Both attention operators, every backend that runs on this machine's CPU.

Two oracles: the ``reference`` backend, and `category_oracle` / `window_oracle` below, which know nothing of groups,
tiles, sorting or rolling: one N×N softmax in float64 whose weights say who meets whom, differentiated by autograd.
"""

import importlib

import pytest
import torch
from flop_counter import flop_counter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ppsr.errors import UserError
from ppsr.ops import category_attention, dispatch, fused, use_backend, window_attention
from ppsr.ops.category_attention.reference import group_index, sort_tokens

BACKENDS = [name for name in ('reference', 'torch', 'native') if dispatch.available(name) is None]
FAST = [name for name in BACKENDS if name != 'reference']
WIDE = ('reference', 'torch')  # take float64


@pytest.fixture(autouse=True, scope='module')
def _one_thread():
    # these tensors are tiny: two threads would wait for each other, for very long on a busy machine
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# B, N, heads, head dim, category_size, number of categories, share of pure tokens (None: no mask)
CATEGORY_CASES = [
    (2, 63, 2, 12, 16, 5, 0.3),
    (2, 63, 2, 12, 16, 5, None),
    (3, 64, 4, 4, 16, 3, 0.5),
    (1, 10, 1, 3, 16, 4, None),
    (2, 1, 2, 4, 8, 1, None),
    (2, 40, 2, 4, 16, 1, 0.2),
    (2, 33, 2, 4, 16, 64, 0.0),
    (2, 24, 2, 4, 8, 5, 1.0),
    (1, 17, 3, 5, 1, 5, 0.1),
    (1, 300, 4, 12, 128, 64, 0.1),
]
# B, H, W, heads, head dim, window_size, shift
WINDOW_CASES = [
    (1, 8, 12, 2, 3, 4, 0),
    (2, 8, 12, 2, 4, 4, 2),
    (2, 8, 8, 1, 4, 4, 1),
    (2, 14, 7, 2, 12, 7, 3),
    (2, 16, 24, 2, 4, 8, 7),
    (1, 4, 4, 1, 3, 4, 2),
    (1, 32, 32, 2, 12, 16, 8),
    (1, 16, 16, 4, 12, 16, 0),
    (2, 3, 2, 2, 2, 1, 0),
]


def category_id(case):
    return 'B{}-N{}-h{}-d{}-g{}-K{}-pure{}'.format(*case)


def window_id(case):
    return 'B{}-H{}-W{}-h{}-d{}-ws{}-shift{}'.format(*case)


def category_inputs(case, dtype=torch.float32, seed=0):
    b, n, h, d, _, categories, share = case
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(b, n, 3 * h * d, generator=g, dtype=torch.float64).to(dtype)
    category = torch.randint(0, categories, (b, n), generator=g)
    pure = None if share is None else torch.rand(b, n, generator=g) < share
    return qkv, torch.tensor([0.6], dtype=torch.float64 if dtype == torch.float64 else torch.float32), category, pure


def window_inputs(case, dtype=torch.float32, seed=0):
    b, height, width, h, d, ws, _ = case
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(b, height, width, 3 * h * d, generator=g, dtype=torch.float64).to(dtype)
    table = torch.randn((2 * ws - 1) ** 2, h, generator=g, dtype=torch.float64)
    return qkv, table.to(torch.float64 if dtype == torch.float64 else torch.float32)


def with_gradients(function, *inputs):
    """Output and gradients of `function` (float tensors in, one tensor out), by name."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    out.backward(weight.to(out.dtype))
    return {'out': out.detach(), **{f'gradient {i}': x.grad for i, x in enumerate(inputs)}}


def run_category(backend, case, qkv, scale, category, pure, compensation='value'):
    with use_backend(backend):
        return with_gradients(
            lambda qkv, scale: category_attention(
                qkv, category, scale, num_heads=case[2], category_size=case[4], pure=pure, compensation=compensation
            ),
            qkv,
            scale,
        )


def run_window(backend, case, qkv, table):
    with use_backend(backend):
        return with_gradients(
            lambda qkv, table: window_attention(qkv, table, num_heads=case[3], window_size=case[5], shift=case[6]),
            qkv,
            table,
        )


def assert_close(got, want, tolerance):
    """`tolerance` is relative to the largest element of the expected tensor."""
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape, name
        assert torch.isfinite(got[name]).all(), f'{name} is not finite'
        error = (got[name].double() - want[name].double()).abs().max().item()
        assert error <= tolerance * max(1.0, want[name].abs().max().item()), f'{name} is off by {error:.3g}'


def weighted_attention(q, k, v, scale, log_weight):
    """q, k, v (N, h, d); log_weight (h or 1, N, N): log of how many times a key is seen, −inf where it is not."""
    logits = torch.einsum('qhd,khd->hqk', q, k) * scale + log_weight
    return torch.einsum('hqk,khd->qhd', logits.softmax(-1), v).flatten(1)


def category_oracle(qkv, scale, category, pure, num_heads, size, keep=True):
    images = []
    for b in range(qkv.shape[0]):
        q, k, v = qkv[b].unflatten(1, (3, num_heads, -1)).unbind(1)
        active = [t for t in range(qkv.shape[1]) if pure is None or not pure[b, t]]
        active.sort(key=lambda t: category[b, t].item())  # Python's sort is stable
        g = min(len(active), size)
        filled = active + active[::-1][: -len(active) % g if g else 0]
        seen = torch.zeros(qkv.shape[1], qkv.shape[1], dtype=qkv.dtype)
        for start in range(0, len(active), g or 1):
            queries, keys = torch.tensor(active[start : start + g]), torch.tensor(filled[start : start + g])
            seen.index_put_((queries[:, None], keys), torch.ones((), dtype=qkv.dtype), accumulate=True)
        exempt = torch.ones(qkv.shape[1], dtype=torch.bool)
        exempt[active] = False
        out = weighted_attention(q, k, v, scale, (seen + torch.diag(exempt.to(qkv.dtype))).log()[None])
        images.append(out if keep else out * ~exempt[:, None])
    return torch.stack(images)


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


# ---------------------------------------------------------------------------------------------------------------------
# Hand-computed values


@pytest.mark.parametrize('backend', BACKENDS)
def test_category_attention_by_hand(backend):
    # sorted: 1 0 2; groups of two: (1, 0) and (2, 2 again). Logits of token 0: ln 3 to key 1, 0 to its own key.
    q, k, v = torch.tensor([3.0]).log().item(), 1.0, 8.0
    qkv = torch.tensor([[[q, 0.0, v], [0.0, k, 4.0], [5.0, 5.0, 7.0]]])
    category = torch.tensor([[1, 0, 1]])
    with use_backend(backend):
        out = category_attention(qkv, category, torch.ones(1), num_heads=1, category_size=2)
    torch.testing.assert_close(out, torch.tensor([[[(8.0 + 3 * 4) / 4], [(8.0 + 4) / 2], [7.0]]]))


@pytest.mark.parametrize('backend', BACKENDS)
def test_filled_up_places_are_keys_a_second_time(backend):
    # five tokens in groups of three: (0 1 2) and (3 4 4); uniform attention in both
    qkv = torch.zeros(1, 5, 3)
    qkv[0, :, 2] = torch.tensor([3.0, 6.0, 9.0, 1.0, 10.0])
    category = torch.zeros(1, 5, dtype=torch.long)
    with use_backend(backend):
        out = category_attention(qkv, category, torch.ones(1), num_heads=1, category_size=3)
    torch.testing.assert_close(out.flatten(), torch.tensor([6.0, 6.0, 6.0, 7.0, 7.0]))


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('compensation', 'expected'), [('value', 20.0), ('bypass', 20.0), ('zero', 0.0)])
def test_pure_token_by_hand(backend, compensation, expected):
    qkv = torch.zeros(1, 3, 3)
    qkv[0, :, 2] = torch.tensor([2.0, 20.0, 4.0])
    pure, category = torch.tensor([[False, True, False]]), torch.zeros(1, 3, dtype=torch.long)
    with use_backend(backend):
        out = category_attention(
            qkv, category, torch.ones(1), num_heads=1, category_size=8, pure=pure, compensation=compensation
        )
    torch.testing.assert_close(out.flatten(), torch.tensor([3.0, expected, 3.0]))


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


def test_order_is_stable_with_the_pure_tokens_last():
    category = torch.tensor([[2, 0, 1, 0, 2, 0], [1, 1, 0, 0, 3, 3]])
    pure = torch.tensor([[False, False, False, True, False, False], [True, False, True, False, False, True]])
    order, counts = sort_tokens(category, pure)
    assert order.tolist() == [[1, 5, 2, 0, 4, 3], [3, 1, 4, 0, 2, 5]]
    assert counts.tolist() == [5, 3]
    order, counts = sort_tokens(category, None)
    assert order.tolist() == [[1, 3, 5, 2, 0, 4], [2, 3, 0, 1, 4, 5]]
    assert counts.tolist() == [6, 6]
    assert order.dtype == counts.dtype == torch.int32


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int64], ids=str)
def test_pure_tokens_stay_behind_the_largest_category(dtype):
    category = torch.tensor([[torch.iinfo(dtype).max - (dtype == torch.int64), 0, 3]]).to(dtype)
    order, _ = sort_tokens(category, torch.tensor([[False, True, False]]))
    assert order.tolist() == [[2, 0, 1]]


@pytest.mark.parametrize(
    ('n', 'size', 'expected'),
    [
        (6, 3, [[0, 1, 2], [3, 4, 5]]),
        (5, 3, [[0, 1, 2], [3, 4, 4]]),
        (7, 3, [[0, 1, 2], [3, 4, 5], [6, 6, 5]]),
        (5, 4, [[0, 1, 2, 3], [4, 4, 3, 2]]),
        (2, 4, [[0, 1]]),
        (1, 1, [[0]]),
    ],
)
def test_groups_are_filled_up_with_the_last_tokens_in_reverse(n, size, expected):
    assert group_index(n, size).tolist() == expected


# ---------------------------------------------------------------------------------------------------------------------
# Against the oracles and the reference


@pytest.mark.parametrize('compensation', ['value', 'zero'])
@pytest.mark.parametrize('case', CATEGORY_CASES, ids=category_id)
@pytest.mark.parametrize('backend', WIDE)
def test_category_attention_float64(backend, case, compensation):
    inputs = category_inputs(case, torch.float64)
    got = run_category(backend, case, *inputs, compensation)
    qkv, scale, category, pure = inputs
    keep = compensation == 'value'
    want = with_gradients(lambda q, s: category_oracle(q, s, category, pure, case[2], case[4], keep), qkv, scale)
    assert_close(got, want, 1e-11)


@pytest.mark.parametrize('case', WINDOW_CASES, ids=window_id)
@pytest.mark.parametrize('backend', WIDE)
def test_window_attention_float64(backend, case):
    inputs = window_inputs(case, torch.float64)
    want = with_gradients(lambda q, t: window_oracle(q, t, case[3], *case[5:]), *inputs)
    assert_close(run_window(backend, case, *inputs), want, 1e-11)


@pytest.mark.parametrize('compensation', ['value', 'zero'])
@pytest.mark.parametrize('case', CATEGORY_CASES, ids=category_id)
@pytest.mark.parametrize('backend', FAST)
def test_category_attention_float32(backend, case, compensation):
    qkv, scale, *rest = category_inputs(case)
    want = run_category('reference', case, qkv.double(), scale.double(), *rest, compensation)
    assert_close(run_category(backend, case, qkv, scale, *rest, compensation), want, 2e-5)


@pytest.mark.parametrize('case', WINDOW_CASES, ids=window_id)
@pytest.mark.parametrize('backend', FAST)
def test_window_attention_float32(backend, case):
    qkv, table = window_inputs(case)
    want = run_window('reference', case, qkv.double(), table.double())
    assert_close(run_window(backend, case, qkv, table), want, 2e-5)


HALF = [torch.bfloat16, torch.float16]


def assert_error_within_twice_the_plain_one(errors):
    """`errors` of the torch and of the reference backend, per seed: the scale's gradient is one number, and by luck
    its error is nothing now and then."""
    for name in errors['torch'][0]:
        ours, plain = (max(error[name] for error in errors[backend]) for backend in ('torch', 'reference'))
        assert ours <= 2 * plain, f'{name}: error {ours:.3g}, plain attention {plain:.3g}'


def errors_to(exact, got, dtype):
    assert got['out'].dtype == got['gradient 0'].dtype == dtype
    assert got['gradient 1'].dtype == torch.float32
    return {name: (got[name].double() - exact[name]).abs().max().item() for name in exact}


@pytest.mark.parametrize('dtype', HALF, ids=str)
@pytest.mark.parametrize('case', [CATEGORY_CASES[0], CATEGORY_CASES[2], CATEGORY_CASES[-1]], ids=category_id)
def test_category_attention_in_half_precision(case, dtype):
    errors = {'torch': [], 'reference': []}
    for seed in range(4):
        qkv, scale, *rest = category_inputs(case, dtype, seed)
        exact = run_category('reference', case, qkv.double(), scale.double(), *rest)
        for backend, list_ in errors.items():
            list_.append(errors_to(exact, run_category(backend, case, qkv, scale, *rest), dtype))
    assert_error_within_twice_the_plain_one(errors)


@pytest.mark.parametrize('dtype', HALF, ids=str)
@pytest.mark.parametrize('case', [WINDOW_CASES[1], WINDOW_CASES[3], WINDOW_CASES[4]], ids=window_id)
def test_window_attention_in_half_precision(case, dtype):
    qkv, table = window_inputs(case, dtype)
    exact = run_window('reference', case, qkv.double(), table.double())
    errors = {b: [errors_to(exact, run_window(b, case, qkv, table), dtype)] for b in ('torch', 'reference')}
    assert_error_within_twice_the_plain_one(errors)


@settings(max_examples=20)
@given(
    st.integers(1, 2), st.integers(1, 40), st.integers(1, 20), st.integers(1, 6), st.sampled_from([0.0, 0.2, 0.7, 1.0])
)
@pytest.mark.parametrize('backend', FAST)
def test_any_size_of_image_and_group(backend, batch, n, size, categories, share):
    case = (batch, n, 2, 3, size, categories, share)
    qkv, scale, category, pure = category_inputs(case, seed=n)
    want = with_gradients(lambda q, s: category_oracle(q, s, category, pure, 2, size), qkv.double(), scale.double())
    assert_close(run_category(backend, case, qkv, scale, category, pure), want, 2e-5)


@settings(max_examples=15)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.data())
@pytest.mark.parametrize('backend', FAST)
def test_any_map_and_shift(backend, batch, rows, columns, ws, data):
    case = (batch, rows * ws, columns * ws, 2, 3, ws, data.draw(st.integers(0, ws - 1)))
    qkv, table = window_inputs(case, seed=rows)
    want = with_gradients(lambda q, t: window_oracle(q, t, 2, *case[5:]), qkv.double(), table.double())
    assert_close(run_window(backend, case, qkv, table), want, 2e-5)


@pytest.mark.parametrize('backend', WIDE)
@pytest.mark.parametrize('share', [None, 0.4])
def test_category_gradcheck(backend, share):
    case = (2, 7, 2, 2, 3, 3, share)
    qkv, scale, category, pure = category_inputs(case, torch.float64)
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda q, s: category_attention(q, category, s, num_heads=2, category_size=3, pure=pure),
            (qkv.requires_grad_(), scale.requires_grad_()),
            fast_mode=True,
        )


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


# ---------------------------------------------------------------------------------------------------------------------
# Invariants


@pytest.mark.parametrize('backend', BACKENDS)
def test_category_batch_equals_single_images(backend):
    case = (3, 50, 2, 4, 16, 5, 0.4)
    qkv, scale, category, pure = category_inputs(case)
    pure[1], pure[2] = False, True  # nothing pure, all pure
    whole = run_category(backend, case, qkv, scale, category, pure)
    for b in range(3):
        single = run_category(backend, case, qkv[b : b + 1], scale, category[b : b + 1], pure[b : b + 1])
        torch.testing.assert_close(whole['out'][b], single['out'][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize('backend', BACKENDS)
def test_window_batch_equals_single_images(backend):
    case = (3, 8, 12, 2, 4, 4, 2)
    qkv, table = window_inputs(case)
    whole = run_window(backend, case, qkv, table)
    for b in range(3):
        single = run_window(backend, case, qkv[b : b + 1], table)
        torch.testing.assert_close(whole['out'][b], single['out'][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize('backend', BACKENDS)
def test_a_mask_without_pure_tokens_changes_no_bit(backend):
    case = (2, 63, 2, 12, 16, 5, 0.0)
    qkv, scale, category, pure = category_inputs(case)
    masked, dense = (run_category(backend, case, qkv, scale, category, mask) for mask in (pure, None))
    for name in dense:
        assert torch.equal(masked[name], dense[name]), name


@pytest.mark.parametrize('backend', BACKENDS)
def test_pure_tokens_influence_nobody(backend):
    case = (2, 63, 2, 12, 16, 5, 0.4)
    qkv, scale, category, pure = category_inputs(case)
    before = run_category(backend, case, qkv, scale, category, pure)
    other = torch.where(pure[..., None], qkv.new_tensor(float('nan')), qkv)
    category = torch.where(pure, 4 - category, category)
    after = run_category(backend, case, other, scale, category, pure, 'zero')
    assert torch.equal(before['out'][~pure], after['out'][~pure]), 'out of the active tokens'
    assert torch.equal(before['gradient 0'][~pure], after['gradient 0'][~pure]), 'gradient of the active tokens'
    assert torch.equal(before['out'][pure], qkv[pure][:, 2 * 24 :]), 'a pure token gets its own value'
    assert not after['out'][pure].any() and not after['gradient 0'][pure].any(), 'zero means nothing'


@pytest.mark.parametrize('backend', BACKENDS)
def test_large_logits(backend):
    # logits of ±1000: no overflow, and the copies in the last group are no queries with another group's log-sum-exp
    case = (1, 37, 2, 4, 16, 3, 0.1)
    qkv, scale, category, pure = category_inputs(case)
    qkv[..., :16] *= 20
    exact = run_category('reference', case, qkv.double(), scale.double(), category, pure)
    assert_close(run_category(backend, case, qkv, scale, category, pure), exact, 1e-2)


@pytest.mark.parametrize('backend', BACKENDS)
def test_non_contiguous_inputs(backend):
    case = (2, 24, 2, 4, 8, 5, 0.3)
    qkv, scale, category, pure = category_inputs(case)
    want = run_category(backend, case, qkv, scale, category, pure)
    with use_backend(backend):
        x = qkv.transpose(1, 2).contiguous().requires_grad_()  # (B, 3·C, N), as a convolution would give it
        s = torch.tensor([[9.0, 0.6]], requires_grad=True)
        spread = torch.stack([category, category], 2)[..., 0]
        out = category_attention(
            x.transpose(1, 2), spread, s[:, 1:], num_heads=2, category_size=8, pure=pure.t().contiguous().t()
        )
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).float()
        grads = torch.autograd.grad(out.mT.contiguous(), (x, s), weight.mT.contiguous())
    got = {'out': out.detach(), 'gradient 0': grads[0].transpose(1, 2), 'gradient 1': grads[1][0, 1:]}
    assert_close(got, want, 1e-6)


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


def test_parts_of_any_size_give_the_same(monkeypatch):
    case, window = (2, 150, 2, 4, 16, 5, 0.2), (3, 24, 16, 2, 4, 4, 1)
    inputs, window_in = category_inputs(case, torch.float64), window_inputs(window, torch.float64)
    want, want_window = run_category('torch', case, *inputs), run_window('torch', window, *window_in)
    monkeypatch.setattr(importlib.import_module('ppsr.ops.category_attention.torch'), '_TOKENS', 48)
    monkeypatch.setattr(fused, '_CPU_ELEMENTS', 3 * 2 * 16 * 16)
    for tokens in (1, 100, 1000):
        monkeypatch.setattr(importlib.import_module('ppsr.ops.window_attention.torch'), '_TOKENS', tokens)
        assert_close(run_window('torch', window, *window_in), want_window, 1e-12)
    assert_close(run_category('torch', case, *inputs), want, 1e-12)


@pytest.mark.parametrize('with_bias', [False, True])
def test_attention_of_devices_without_a_fused_kernel(monkeypatch, with_bias):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, 2, n, 12, generator=g, dtype=torch.float64) for n in (7, 9, 9))
    bias = torch.randn(2, 7, 9, generator=g, dtype=torch.float64) if with_bias else None
    monkeypatch.setattr(fused, '_DEVICE_ELEMENTS', 2 * 2 * 7 * 9)
    want = fused.attention(q, k, v, 0.3, bias)
    got = fused.attention_in_parts(q, k, v, torch.tensor([0.3], dtype=torch.float64), bias)
    assert_close(dict(zip(['out', 'lse'], got)), dict(zip(['out', 'lse'], want)), 1e-12)


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


# ---------------------------------------------------------------------------------------------------------------------
# One operator for PyTorch


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('share', [None, 0.3])
def test_category_opcheck(backend, share):
    qkv, scale, category, pure = category_inputs((2, 13, 2, 4, 4, 3, share))
    with use_backend(backend):
        arguments = (qkv.requires_grad_(), category, pure, scale.requires_grad_(), 2, 4, True)
        torch.library.opcheck(torch.ops.ppsr.category_attention.default, arguments)
        qkv, scale = qkv.detach(), scale.detach()
        saved = torch.ops.ppsr.category_attention(qkv, category, pure, scale, 2, 4, True)
        arguments = (torch.randn_like(saved[0]), qkv, *saved, scale, 2, 4, True)
        torch.library.opcheck(torch.ops.ppsr.category_attention_backward.default, arguments)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('shift', [0, 1])
def test_window_opcheck(backend, shift):
    qkv, table = window_inputs((2, 4, 4, 2, 4, 2, shift))
    with use_backend(backend):
        arguments = (qkv.requires_grad_(), table.requires_grad_(), 2, 2, shift)
        torch.library.opcheck(torch.ops.ppsr.window_attention.default, arguments)
        qkv, table = qkv.detach(), table.detach()
        out, lse = torch.ops.ppsr.window_attention(qkv, table, 2, 2, shift)
        arguments = (torch.randn_like(out), qkv, out, lse, table, 2, 2, shift)
        torch.library.opcheck(torch.ops.ppsr.window_attention_backward.default, arguments)


@pytest.mark.parametrize(
    ('pure', 'expected'),
    [
        (None, 2 * 2 * 8 * 4 * 6),  # 8 queries, 4 keys each, 6 channels, two products, two operations each
        ([], 2 * 2 * 8 * 4 * 6),
        ([0, 3, 4], 2 * 2 * 5 * 4 * 6),  # 5 tokens: the three filled-up places are no queries
        ([0, 1, 2, 3, 4, 5], 2 * 2 * 2 * 2 * 6),  # 2 tokens: a group of two
        (list(range(8)), 0),
    ],
    ids=['dense', 'none-pure', '3-pure', '6-pure', 'all-pure'],
)
def test_category_flops(pure, expected):
    qkv, scale = torch.randn(1, 8, 18, requires_grad=True), torch.ones(1)
    mask = None if pure is None else torch.zeros(1, 8, dtype=torch.bool)
    if pure:
        mask[0, pure] = True
    with flop_counter() as forward:
        out = category_attention(
            qkv, torch.zeros(1, 8, dtype=torch.long), scale, num_heads=2, category_size=4, pure=mask
        )
    assert forward.get_total_flops() == expected
    with flop_counter() as backward:
        out.sum().backward()
    assert backward.get_total_flops() == expected * 5 // 2


def test_category_flops_of_a_batch_add_up():
    pure = torch.zeros(2, 8, dtype=torch.bool)
    pure[1, :6] = True
    category = torch.zeros(2, 8, dtype=torch.long)
    with flop_counter() as counter:
        category_attention(torch.randn(2, 8, 18), category, torch.ones(1), num_heads=2, category_size=4, pure=pure)
    assert counter.get_total_flops() == 2 * 2 * (8 * 4 + 2 * 2) * 6


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
        second = torch.ops.ppsr.window_attention(x, table, 2, 4, 2)
        grad = torch.ops.ppsr.category_attention_backward(first[0], tokens, *first, scale, 2, 16, True)
        return *first, *second, *grad, *torch.ops.ppsr.window_attention_backward(second[0], x, *second, table, 2, 4, 2)

    arguments = x, tokens, scale, table, category, pure
    with use_backend(backend):
        real = run(*arguments)
    with FakeTensorMode() as mode:
        fake = run(*(mode.from_tensor(t) for t in arguments))
    meta = run(*(t.to('meta') for t in arguments))
    for i, (r, f, m) in enumerate(zip(real, fake, meta, strict=True)):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), f'fake result {i}'
        assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride()), f'meta result {i}'


def test_flops_of_meta_tensors_are_the_dense_count():
    qkv, category = torch.empty(1, 8, 18, device='meta'), torch.empty(1, 8, dtype=torch.long, device='meta')
    pure, scale = torch.empty(1, 8, dtype=torch.bool, device='meta'), torch.empty(1, device='meta')
    with flop_counter() as counter:
        category_attention(qkv, category, scale, num_heads=2, category_size=4, pure=pure)
    assert counter.get_total_flops() == 2 * 2 * 8 * 4 * 6


# ---------------------------------------------------------------------------------------------------------------------
# Bad arguments and the choice of a backend


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'qkv': torch.zeros(2, 4)}, r'qkv must .*got torch.float32 \(2, 4\)'),
        ({'qkv': torch.zeros(2, 4, 10)}, r'C a multiple of num_heads=2, got torch.float32 \(2, 4, 10\)'),
        ({'qkv': torch.zeros(2, 4, 12, dtype=torch.long)}, 'qkv must be floating'),
        ({'qkv': torch.zeros(2, 0, 12), 'category': torch.zeros(2, 0, dtype=torch.long)}, r'none of them 0'),
        ({'category': torch.zeros(2, 5, dtype=torch.long)}, r'category must be integer \(2, 4\)'),
        ({'category': torch.zeros(2, 4)}, 'category must be integer'),
        ({'category': torch.zeros(2, 4, dtype=torch.bool)}, 'category must be integer'),
        ({'category': torch.zeros(2, 4, dtype=torch.long, device='meta')}, 'category must be on the device of qkv'),
        ({'pure': torch.zeros(2, 3, dtype=torch.bool)}, r'pure must be bool \(2, 4\)'),
        ({'pure': torch.zeros(2, 4)}, 'pure must be bool'),
        ({'scale': torch.ones(2)}, 'scale must hold one'),
        ({'scale': torch.ones(1, dtype=torch.long)}, 'scale must hold one floating'),
        ({'num_heads': 0}, 'num_heads must be at least 1'),
        ({'category_size': 0}, 'category_size must be at least 1'),
        ({'compensation': 'mean'}, "compensation must be one of value, bypass, zero, got 'mean'"),
    ],
)
def test_category_argument_errors(change, message):
    arguments = {
        'qkv': torch.zeros(2, 4, 12),
        'category': torch.zeros(2, 4, dtype=torch.long),
        'scale': torch.ones(1),
        'num_heads': 2,
        'category_size': 3,
    }
    category_attention(**arguments)  # they do fit as they are
    with pytest.raises(ValueError, match=message):
        category_attention(**(arguments | change))


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
    ],
)
def test_window_argument_errors(change, message):
    arguments = {'qkv': torch.zeros(1, 4, 4, 12), 'bias_table': torch.zeros(9, 2), 'num_heads': 2, 'window_size': 2}
    window_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        window_attention(**(arguments | change))


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
