"""The library of compiled kernels: instruction sets, threads, its exponential, what both attentions promise alike."""

import sys

import numpy as np
import pytest
import torch
from attention_kernels import category_inputs, run_categories, run_windows, window_inputs
from processes import Process

from ppsr.ops import category_attention, dispatch, native, use_backend, window_attention

if native.unavailable_reason():
    pytest.skip(native.unavailable_reason(), allow_module_level=True)

from ppsr.ops.category_attention import native as category_native
from ppsr.ops.window_attention import native as window_native


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
        torch.library.opcheck(
            torch.ops.ppsr.window_attention, (qkv.requires_grad_(), table.requires_grad_(), None, 2, 4, 1)
        )
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


def test_denormal_mode_is_restored_in_the_threads_of_torch(threads):
    threads(2)
    qkv, table, _ = window_inputs(8, (32, 32), 2, 12, 1)
    window_native.forward(qkv, table, None, 2, 8, 0)
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
    forward(torch.randn(1, 32, 32, 36), torch.randn(225, 1), None, 1, 8, 0)
names = 'libgomp', 'libomp', 'libiomp'
runtimes = {line.split()[-1] for line in open('/proc/self/maps') if any(name in line for name in names)}
print(len(runtimes), count() - before, native.openmp() is not None)
"""
    process = Process(program)
    assert process.wait() == 0 and process.stdout.split() == [b'1', b'0', b'True'], process.stdout + process.stderr
