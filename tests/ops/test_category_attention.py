"""Category attention: values by hand, the oracle, every backend, gradients, and one operator for PyTorch."""

import pytest
import torch
from attention_cases import (
    BACKENDS,
    CATEGORY_CASES,
    FAST,
    HALF,
    WIDE,
    assert_close,
    assert_error_within_twice_the_plain_one,
    category_id,
    category_inputs,
    errors_to,
    run_category,
    weighted_attention,
    with_gradients,
)
from flop_counter import flop_counter
from hypothesis import given, settings
from hypothesis import strategies as st

from ppsr.ops import category_attention, use_backend
from ppsr.ops.category_attention.reference import group_index, sort_tokens


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


@pytest.mark.parametrize('compensation', ['value', 'zero'])
@pytest.mark.parametrize('case', CATEGORY_CASES, ids=category_id)
@pytest.mark.parametrize('backend', FAST)
def test_category_attention_float32(backend, case, compensation):
    qkv, scale, *rest = category_inputs(case)
    want = run_category('reference', case, qkv.double(), scale.double(), *rest, compensation)
    assert_close(run_category(backend, case, qkv, scale, *rest, compensation), want, 2e-5)


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
def test_without_filling_the_others_get_the_same(backend):
    qkv, scale, category, pure = category_inputs((2, 40, 2, 4, 8, 3, 0.4))
    with use_backend(backend):
        filled, not_filled = (
            category_attention(qkv, category, scale, num_heads=2, category_size=8, pure=pure, fill=fill)
            for fill in (True, False)
        )
    assert torch.equal(filled[~pure], not_filled[~pure])


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


def test_flops_of_meta_tensors_are_the_dense_count():
    qkv, category = torch.empty(1, 8, 18, device='meta'), torch.empty(1, 8, dtype=torch.long, device='meta')
    pure, scale = torch.empty(1, 8, dtype=torch.bool, device='meta'), torch.empty(1, device='meta')
    with flop_counter() as counter:
        category_attention(qkv, category, scale, num_heads=2, category_size=4, pure=pure)
    assert counter.get_total_flops() == 2 * 2 * 8 * 4 * 6


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
