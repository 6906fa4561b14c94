"""The compiled attention kernels called directly, without operators and autograd around them."""

import torch


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


def run_windows(module, qkv, table, grad, heads, ws, shift, pure=None):
    out, lse = module.forward(qkv, table, pure, heads, ws, shift)
    return out, lse, *module.backward(grad, qkv, out, lse, table, pure, heads, ws, shift)


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
