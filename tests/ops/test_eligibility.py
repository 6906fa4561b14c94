"""When kernels stand in for modules, and when they step aside."""

import pytest
import torch
from layer_kernels import needs_native
from torch import nn

from ppsr.ops import use_backend
from ppsr.ops.depthwise import depthwise_mix
from ppsr.ops.dictionary import dictionary_attention, dictionary_refinement
from ppsr.ops.linear import linear_add, norm_linear


@needs_native
def test_what_the_kernels_do_not_know_runs_in_pytorch():
    """The functions take all that their definitions take."""
    x, layer, norm = torch.randn(2, 30, 16), nn.Linear(16, 20), nn.LayerNorm(16)
    q, k, v, u = torch.randn(2, 30, 4), torch.randn(1, 7, 4), torch.randn(1, 7, 16), torch.randn(2, 9, 8, 16)
    statistics = nn.InstanceNorm1d(7, affine=True, track_running_stats=True).eval()
    nn.init.uniform_(statistics.running_mean)
    no_bias, over_two = nn.Linear(16, 20, bias=False), nn.LayerNorm((30, 16))
    mixed = {
        'added to every token': lambda: linear_add(x, layer, torch.arange(20.0)),
        'three to add': lambda: linear_add(x, layer, *3 * [torch.ones(2, 30, 20)]),
        'double to add': lambda: linear_add(x, layer, torch.ones(2, 30, 20, dtype=torch.float64)),
        'no bias': lambda: linear_add(x, no_bias),
        'three layers': lambda: torch.stack(norm_linear(x, norm, layer, layer, layer)),
        'norm over two': lambda: norm_linear(x, over_two, layer)[0],
        'norm without weights': lambda: norm_linear(x, nn.LayerNorm(16, elementwise_affine=False), layer)[0],
        'one dictionary': lambda: dictionary_attention(q, k, v)[0],
        'running statistics': lambda: dictionary_refinement(dictionary_attention(q[:1], k, v)[2], x[:1], statistics),
        'no tokens': lambda: dictionary_attention(q[:1, :0], k, v)[0],
        'no images': lambda: linear_add(x[:0], layer),
    }
    torch.manual_seed(0)
    for name, kind in {
        'reflected': dict(padding=1, padding_mode='reflect'),
        'dilated': dict(padding=2, dilation=2),
        'full': dict(padding=1, groups=1),
    }.items():
        conv = nn.Conv2d(16, 16, 3, **{'groups': 16} | kind)
        mixed[name] = lambda conv=conv: depthwise_mix(u, conv)
    for name, run in mixed.items():
        with torch.no_grad():
            with use_backend('native'):
                actual = run()
            with use_backend('torch'):
                expected = run()
        assert torch.equal(actual, expected), name


@needs_native
def test_kernels_step_aside():
    """Under autocast and under torch.compile the definition runs; where a gradient is wanted, what has a backward."""
    x, linear = torch.randn(1, 10, 16), nn.Linear(16, 16)
    with use_backend('native'):
        assert linear_add(x, linear, x).requires_grad
        with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
            assert linear_add(x, linear).dtype == torch.bfloat16
        with torch.no_grad(), use_backend('torch'):
            expected = linear_add(x, linear, x)
        with torch.no_grad():
            compiled = torch.compile(lambda x: linear_add(x, linear, x), backend='eager', fullgraph=True)
            assert torch.equal(compiled(x), expected)


@needs_native
def test_modules_that_are_more_than_weights_are_called():
    """An adapter in place of a layer, or a hook on it (a profiler's), is not bypassed."""

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    x, plain, adapter, hooked = torch.randn(1, 10, 16), nn.Linear(16, 16), Adapter(16, 16), nn.Linear(16, 16)
    patched = nn.Linear(16, 16)
    for module in (adapter, patched):
        module.load_state_dict(plain.state_dict())
    patched.forward = lambda x: nn.Linear.forward(patched, x) + 1
    seen = []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), use_backend('native'):
        expected = linear_add(x, plain) + 1
        for module in (adapter, patched):
            assert torch.allclose(linear_add(x, module), expected, atol=1e-6)
        norm_linear(x, nn.LayerNorm(16), plain, hooked)
    assert seen


@needs_native
@pytest.mark.parametrize('register', ['register_module_forward_hook', 'register_module_forward_pre_hook'])
def test_hooks_on_all_modules_see_every_module(register):
    """torch.nn.modules.module's global hooks, with which profilers and summaries watch a whole program."""
    x, norm, linear, called = torch.randn(1, 4, 5, 16), nn.LayerNorm(16), nn.Linear(16, 16), []
    conv, norm3 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.InstanceNorm1d(7, affine=True)
    q, k, v = torch.randn(1, 20, 4), torch.randn(1, 7, 4), torch.randn(1, 7, 16)

    def run():
        norm_linear(x, norm, linear)
        linear_add(x, linear, x)
        depthwise_mix(x, conv)
        dictionary_refinement(dictionary_attention(q, k, v)[2], x.flatten(1, 2), norm3)

    with torch.no_grad(), use_backend('native'):
        hook = getattr(nn.modules.module, register)(lambda module, *_: called.append(module))
        try:
            run()
        finally:
            hook.remove()
        assert called == [norm, linear, linear, conv, norm3]
        run()
    assert len(called) == 5, 'without the hook the kernels run again'
