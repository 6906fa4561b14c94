"""The compiled CPU kernels against the float64 definition, and the properties that a user relies on."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from ppsr.ops import category_attention, dispatch, native, use_backend, window_attention
from ppsr.ops.category_attention import reference as category_reference
from ppsr.ops.window_attention import reference as window_reference

if native.unavailable_reason():
    pytest.skip(native.unavailable_reason(), allow_module_level=True)

from ppsr.ops.category_attention import native as category_native
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


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_close(name, actual, expected, floor=0.0):
    """Errors relative to the largest element: rounding in a sum is of the size of its largest terms."""
    assert actual.shape == expected.shape, name
    assert actual.dtype == torch.float32, name
    assert not actual.isnan().any(), f'{name} has NaN'
    error = (actual - expected).abs().max() if actual.numel() else torch.tensor(0.0)
    bound = 5e-6 * max(expected.abs().max().item() if actual.numel() else 0.0, floor)
    assert error <= bound, f'{name}: error {error:.2e} exceeds {bound:.2e}'


def window_inputs(ws, size, heads, dim, batch, seed=0):
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, *size, 3 * heads * dim, generator=g)
    return qkv, torch.randn((2 * ws - 1) ** 2, heads, generator=g), torch.randn(batch, *size, heads * dim, generator=g)


def run_windows(module, qkv, table, grad, heads, ws, shift):
    out, lse = module.forward(qkv, table, heads, ws, shift)
    return out, lse, *module.backward(grad, qkv, out, lse, table, heads, ws, shift)


def category_inputs(n, heads, dim, categories, pure, seed=0):
    g = torch.Generator().manual_seed(seed)
    batch = len(pure)
    qkv = torch.randn(batch, n, 3 * heads * dim, generator=g)
    category = torch.randint(0, categories, (batch, n), generator=g)
    mask = None
    if pure[0] is not None:
        mask = torch.rand(batch, n, generator=g) < torch.tensor(pure)[:, None]
    return qkv, category, mask, torch.tensor([1.3]), torch.randn(batch, n, heads * dim, generator=g)


def run_categories(module, qkv, category, pure, scale, grad, heads, g, keep):
    saved = module.forward(qkv, category, pure, scale, heads, g, keep)
    return *saved, *module.backward(grad, qkv, *saved, scale, heads, g, keep)


@pytest.mark.parametrize('ws, size, shift, heads, dim, batch', WINDOWS)
def test_window_attention_is_the_definition(target, ws, size, shift, heads, dim, batch):
    inputs = window_inputs(ws, size, heads, dim, batch)
    actual = run_windows(window_native, *inputs, heads, ws, shift)
    expected = run_windows(window_reference, *(x.double() for x in inputs), heads, ws, shift)
    for name, a, e in zip(('out', 'lse', 'grad_qkv', 'grad_table'), actual, expected):
        assert_close(name, a, e, floor=1.0)


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


def test_gradients_through_autograd_agree_with_finite_differences(target):
    qkv, table, grad = window_inputs(4, (4, 8), 2, 3, 1)
    category = torch.arange(32).remainder(5)[None]
    scale, mask = torch.tensor([0.8]), torch.arange(32)[None].remainder(7) == 0

    def loss(qkv, table, scale):
        windows = window_attention(qkv, table, num_heads=2, window_size=4, shift=2)
        tokens = category_attention(
            qkv.flatten(1, 2), category, scale, num_heads=2, category_size=9, pure=mask, compensation='value'
        )
        return (windows.double() * grad).sum() + (tokens.double() * grad.flatten(1, 2)).sum()

    inputs = [x.requires_grad_() for x in (qkv, table, scale)]
    with use_backend('native'):
        loss(*inputs).backward()
        for number, x in enumerate(inputs):
            direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(number))
            with torch.no_grad():
                plus, minus = (
                    loss(*(y + sign * 1e-2 * direction if y is x else y for y in inputs)) for sign in (1, -1)
                )
            slope = (x.grad.double() * direction).sum().item()
            assert slope == pytest.approx(((plus - minus) / 2e-2).item(), rel=5e-3, abs=5e-3)


@pytest.mark.parametrize('contiguous', [True, False])
def test_opcheck(contiguous):
    qkv, table, _ = window_inputs(4, (8, 4), 2, 3, 2)
    category = torch.arange(32).remainder(5).expand(2, 32)
    pure = torch.arange(64).view(2, 32).remainder(5) == 0
    if not contiguous:
        qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
        pure = pure.t().contiguous().t()
    tokens = qkv.detach().view(2, 32, 18) if contiguous else torch.randn(32, 2, 18).transpose(0, 1)
    with use_backend('native'):
        torch.library.opcheck(torch.ops.ppsr.window_attention, (qkv.requires_grad_(), table.requires_grad_(), 2, 4, 1))
        torch.library.opcheck(
            torch.ops.ppsr.category_attention,
            (tokens.requires_grad_(), category, pure, torch.tensor([0.7], requires_grad=True), 3, 9, True),
        )


def test_not_contiguous_inputs_give_the_same():
    qkv, table, grad = window_inputs(4, (8, 12), 2, 12, 2)
    odd = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (qkv, table, grad)]
    for a, b in zip(run_windows(window_native, qkv, table, grad, 2, 4, 1), run_windows(window_native, *odd, 2, 4, 1)):
        assert torch.equal(a, b)


def test_same_bits_every_time_and_for_any_number_of_threads(target, threads):
    window = window_inputs(8, (24, 40), 4, 12, 2)
    tokens = category_inputs(1000, 4, 12, 20, [0.3, 0.0])
    runs = []
    for count in (1, 2, 2, 3):
        threads(count)
        runs.append(
            run_windows(window_native, *window, 4, 8, 3) + run_categories(category_native, *tokens, 4, 32, True)
        )
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run))


def test_an_image_in_a_batch_is_the_image_alone(target):
    qkv, table, grad = window_inputs(8, (16, 24), 4, 12, 3)
    together = run_windows(window_native, qkv, table, grad, 4, 8, 4)
    for b in range(3):
        alone = run_windows(window_native, qkv[b : b + 1], table, grad[b : b + 1], 4, 8, 4)
        assert all(torch.equal(a[0], t[b]) for a, t in zip(alone[:3], together[:3]))
    qkv, category, mask, scale, grad = category_inputs(100, 4, 12, 6, [0.2, 0.8, 0.0])
    together = run_categories(category_native, qkv, category, mask, scale, grad, 4, 32, True)
    for b in range(3):
        one = slice(b, b + 1)
        alone = run_categories(category_native, qkv[one], category[one], mask[one], scale, grad[one], 4, 32, True)
        assert all(torch.equal(a[0], t[b]) for a, t in zip(alone[:5], together[:5]))


def test_pure_tokens_do_not_reach_the_others(target):
    qkv, category, mask, scale, _ = category_inputs(80, 2, 12, 6, [0.5])
    out = category_native.forward(qkv, category, mask, scale, 2, 16, True)[0]
    spoiled = torch.where(mask[..., None], torch.tensor(float('nan')), qkv)
    active = ~mask
    assert torch.equal(out[active], category_native.forward(spoiled, category, mask, scale, 2, 16, True)[0][active])
    assert torch.equal(out[mask], qkv[mask][:, 48:])
    assert not category_native.forward(qkv, category, mask, scale, 2, 16, False)[0][mask].any()


def exp2(x):
    """The kernels' 2^x of a float32 array."""
    raw = torch.zeros(x.size + 32)
    skip = -raw.data_ptr() % 64 // 4
    buffer = raw[skip : skip + -(-x.size // 16) * 16]
    buffer[: x.size] = torch.from_numpy(x)
    native.library().ppsr_exp2(buffer.data_ptr(), buffer.data_ptr(), buffer.numel())
    return buffer[: x.size].numpy()


def test_exponential_within_two_ulp(target):
    rng = np.random.default_rng(0)
    x = np.concatenate([-rng.uniform(0, 126, 200_000), -rng.uniform(0, 1, 50_000), -np.arange(127.0)]).astype(
        np.float32
    )
    exact = np.exp2(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (np.abs(exp2(x) - exact) / ulp).max() <= 2
    special = exp2(np.array([0, -0.0, -1, -127, -1e4, -np.inf, np.nan, -np.nan], np.float32))
    assert special[:6].tolist() == [1, 1, 0.5, 0, 0, 0]
    assert np.isnan(special[6:]).all()


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


def test_denormal_mode_is_restored_in_the_threads_of_torch(threads):
    threads(2)
    qkv, table, _ = window_inputs(8, (32, 32), 2, 12, 1)
    window_native.forward(qkv, table, 2, 8, 0)
    assert (torch.full((1_000_000,), 1e-39) * 0.5 > 0).all()


def test_the_automatic_choice_on_the_cpu_is_native():
    with use_backend(None):
        assert dispatch.choose(torch.zeros(1)) == 'native'
        assert dispatch.choose(torch.zeros(1, dtype=torch.float64)) != 'native'


def test_the_best_instruction_set_is_taken_and_absent_ones_are_refused():
    have = native.targets()
    assert have[-1] == 'baseline'
    assert native.target() == have[0]
    try:
        for name in ('avx512', 'avx2', 'baseline', 'sse9'):
            assert native.set_target(name) == (name in have)
            assert native.target() == name or name not in have
    finally:
        assert native.set_target(None)
    assert native.target() == have[0]


def test_empty_inputs(target):
    for size in ((0, 8), (8, 0)):
        qkv, table, grad = window_inputs(4, size, 2, 3, 1)
        out, _, grad_qkv, grad_table = run_windows(window_native, qkv, table, grad, 2, 4, 1)
        assert out.shape == grad.shape
        assert grad_qkv.shape == qkv.shape
        assert not grad_table.any()
    out = run_categories(category_native, *category_inputs(0, 2, 3, 4, [None]), 2, 4, True)
    assert out[0].shape == (1, 0, 6)


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_one_openmp_runtime_and_the_threads_of_torch():
    program = """
import torch
from ppsr.ops import native
from ppsr.ops.window_attention.native import forward
torch.set_num_threads(2)
torch.randn(1 << 20).sum(), torch.randn(300, 300) @ torch.randn(300, 300)
count = lambda: len(__import__('os').listdir('/proc/self/task'))
before = count()
for _ in range(3):
    forward(torch.randn(1, 32, 32, 36), torch.randn(225, 1), 1, 8, 0)
names = 'libgomp', 'libomp', 'libiomp'
runtimes = {line.split()[-1] for line in open('/proc/self/maps') if any(name in line for name in names)}
print(len(runtimes), count() - before, native._openmp_entry() is not None)
"""
    env = os.environ | {'OMP_NUM_THREADS': '2'}
    result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, env=env, timeout=100)
    assert result.stdout.split() == ['1', '0', 'True'], result.stdout + result.stderr
