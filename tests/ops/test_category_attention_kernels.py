"""The compiled kernels of category attention, on every instruction set, against the float64 definition."""

import pytest
import torch
from attention_kernels import assert_close, category_inputs, run_categories

from ppsr.ops import native
from ppsr.ops.category_attention import reference as category_reference

if native.unavailable_reason():
    pytest.skip(native.unavailable_reason(), allow_module_level=True)

from ppsr.ops.category_attention import native as category_native

# tokens, heads, head dim, g, categories, share of pure tokens per image, keep
CATEGORIES = [
    pytest.param(63, 4, 12, 16, 9, [None, None], True, id='63tokens-dim12-dense'),
    pytest.param(63, 4, 12, 16, 9, [0.4, 0.0, 0.9], True, id='63tokens-three-images-of-unlike-masks'),
    pytest.param(200, 2, 5, 128, 9, [0.3], False, id='200tokens-dim5-zero-compensation'),
    pytest.param(150, 1, 64, 100, 1, [0.0], True, id='one-category-dim64'),
    pytest.param(130, 3, 16, 128, 5000, [0.0, 0.02], True, id='dim16-more-categories-than-a-digit'),
    pytest.param(1, 1, 12, 128, 4, [None], True, id='one-token'),
    pytest.param(20, 2, 12, 8, 4, [1.0, 0.5], True, id='one-image-all-pure'),
    pytest.param(20, 2, 12, 8, 4, [1.0], False, id='all-pure-zero-compensation'),
    pytest.param(40, 2, 12, 1, 4, [0.2], True, id='groups-of-one'),
]


@pytest.mark.parametrize('n, heads, dim, g, categories, pure, keep', CATEGORIES)
def test_category_attention_is_the_definition(target, n, heads, dim, g, categories, pure, keep):
    qkv, category, mask, scale, grad = category_inputs(n, heads, dim, categories, pure)
    actual = run_categories(category_native, qkv, category, mask, scale, grad, heads, g, keep)
    wide = (x.double() if x is not None and x.is_floating_point() else x for x in (qkv, category, mask, scale, grad))
    expected = run_categories(category_reference, *wide, heads, g, keep)
    out, lse, order, counts, grad_qkv, grad_scale = actual
    assert counts.tolist() == expected[3].tolist()
    for b, active in enumerate(counts):
        assert order[b, :active].tolist() == expected[2][b, :active].tolist(), 'a stable sort'
        assert sorted(order[b].tolist()) == list(range(n)), 'a permutation'
    assert_close('out', out, expected[0])
    assert_close('lse', lse, expected[1], floor=1.0)
    assert_close('grad_qkv', grad_qkv, expected[4], floor=1.0)
    # a sum over all queries of terms of either sign: as large as its terms, not as its value
    assert_close('grad_scale', grad_scale, expected[5], floor=(qkv.abs().sum() * 0.1).item())


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int32, torch.int64])
def test_categories_of_any_integer_type_and_size(dtype):
    qkv, category, mask, scale, _ = category_inputs(90, 2, 4, 200, [0.2])
    if dtype == torch.int64:
        category = category * (1 << 40)  # only the order matters
    out, _, order, counts = category_native.forward(qkv, category.to(dtype), mask, scale, 2, 16, True)
    expected = category_reference.forward(qkv, category, mask, scale, 2, 16, True)
    assert order[0, : counts[0]].tolist() == expected[2][0, : counts[0]].tolist()
    torch.testing.assert_close(out, expected[0])


def test_pure_tokens_do_not_reach_the_others(target):
    qkv, category, mask, scale, _ = category_inputs(80, 2, 12, 6, [0.5])
    out = category_native.forward(qkv, category, mask, scale, 2, 16, True)[0]
    spoiled = torch.where(mask[..., None], torch.tensor(float('nan')), qkv)
    active = ~mask
    assert torch.equal(out[active], category_native.forward(spoiled, category, mask, scale, 2, 16, True)[0][active])
    assert torch.equal(out[mask], qkv[mask][:, 48:])
    assert not category_native.forward(qkv, category, mask, scale, 2, 16, False)[0][mask].any()
