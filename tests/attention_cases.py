"""Cases of both attention operators, and what runs them on every backend of this machine's CPU, forward and backward.

Oracles are built from `weighted_attention`, which knows nothing of groups, tiles, sorting or rolling: one N×N softmax
in float64 whose weights say who meets whom, differentiated by autograd.
"""

import torch

from ppsr.ops import category_attention, dispatch, use_backend, window_attention

BACKENDS = [name for name in ('reference', 'torch', 'native') if dispatch.available(name) is None]

FAST = [name for name in BACKENDS if name != 'reference']

WIDE = ('reference', 'torch')  # take float64

HALF = [torch.bfloat16, torch.float16]


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


def run_window(backend, case, qkv, table, pure=None):
    with use_backend(backend):
        return with_gradients(
            lambda qkv, table: window_attention(
                qkv, table, num_heads=case[3], window_size=case[5], shift=case[6], pure=pure
            ),
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
