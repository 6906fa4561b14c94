"""What stands between the self-attentions: the compiled kernels against the PyTorch definition in float64."""

import math

import pytest
import torch
from flop_counter import flop_counter
from torch import nn

from ppsr.archs import PPATDLight
from ppsr.ops import layers, native, use_backend
from ppsr.ops.layers import Similarity

needs_native = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomise(module):
    g = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64, generator=g)
    return module


def both(function, *modules):
    """Results of function(dtype, *modules): the kernels in float32, the definition in float64."""
    results = []
    for dtype, backend in ((torch.float32, 'native'), (torch.float64, 'torch')):
        with torch.no_grad(), use_backend(backend):
            results.append(function(dtype, *(module.to(dtype) for module in modules)))
    return results


def assert_close(actual, expected, bound=3e-6):
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error <= bound * max(1.0, expected.abs().max().item()), error


# tokens, channels, outputs: whole and broken panels, vectors, chunks and tasks
SIZES = [(1, 48, 48), (61, 48, 144), (1000, 48, 48), (500, 36, 72), (97, 24, 5), (53, 7, 3), (49, 17, 33)]


@needs_native
@pytest.mark.parametrize('n, channels, width', SIZES)
@pytest.mark.parametrize('gelu', [False, True], ids=['linear', 'gelu'])
def test_norm_linear(target, n, channels, width, gelu):
    x = random(2, n, channels) * 3 + 1
    modules = nn.LayerNorm(channels, eps=1e-3), nn.Linear(channels, width), nn.Linear(channels, 8)
    for module in modules:
        randomise(module)
    for actual, expected in zip(*both(lambda d, *m: layers.norm_linear(x.to(d), *m, gelu=gelu), *modules)):
        assert_close(actual, expected)


@needs_native
@pytest.mark.parametrize('n, channels, width', SIZES)
@pytest.mark.parametrize('added', [0, 1, 2])
def test_linear_add(target, n, channels, width, added):
    x, add = random(2, n, channels), [random(2, n, width, seed=i) for i in range(added)]
    linear = randomise(nn.Linear(channels, width))
    assert_close(*both(lambda d, m: layers.linear_add(x.to(d), m, *(a.to(d) for a in add)), linear))


@needs_native
def test_gelu(target):
    """Within 2.5e-7 of max(1, |x|) of x·Φ(x) everywhere, and 0 far below. What is not finite stays visible: −∞ is −∞·0.

    The definition is computed here: PyTorch's own GELU of ±∞ depends on the processor.
    """

    def definition(x):
        return torch.tensor([[value * math.erfc(-value / math.sqrt(2)) / 2] for value in x.flatten().tolist()])

    x = torch.linspace(-12, 12, 24001)[:, None]
    special = torch.tensor([[math.inf], [-math.inf], [math.nan], [-1e30], [1e30], [-0.0]])
    one = nn.Linear(1, 1)
    with torch.no_grad(), use_backend('native'):
        one.weight.fill_(1), one.bias.zero_()
        norm = nn.LayerNorm(1)

        def gelu(x):
            return torch.ops.ppsr.linear(x, [], norm.eps, [one.weight], [one.bias], [], True)[0]

        actual = gelu(x)
        assert ((actual.double() - definition(x.double())).abs() <= 2.5e-7 * x.abs().clamp(min=1)).all()
        assert (actual[x < -5.6] == 0).all()
        assert definition(special).flatten().tolist() == pytest.approx(
            [math.inf, math.nan, math.nan, 0, 1e30, 0], nan_ok=True
        )
        assert torch.allclose(gelu(special), definition(special), rtol=2.5e-7, equal_nan=True)


# channels, kernel, map: narrower than the kernel, broken vectors, several strips of columns
@needs_native
@pytest.mark.parametrize(
    'channels, kernel, size',
    [(48, 7, (17, 70)), (36, 5, (9, 8)), (24, 3, (3, 40)), (20, 9, (12, 12)), (16, 7, (2, 3)), (17, 7, (5, 33))],
)
def test_depthwise_mix(target, channels, kernel, size):
    u = random(2, *size, channels)
    conv = randomise(nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels))
    assert_close(*both(lambda d, m: layers.depthwise_mix(u.to(d), m), conv))


def dictionary(n, rank, entries, channels, batch=2):
    q, k, v = random(batch, n, rank), random(batch, entries, rank, seed=1), random(batch, entries, channels, seed=2)
    x = random(batch, n, channels, seed=3)
    norm = randomise(nn.InstanceNorm1d(entries, affine=True))

    def run(dtype, norm):
        out, category, similarity = layers.dictionary_attention(q.to(dtype), k.to(dtype), v.to(dtype))
        assert (similarity.matrix is None) == (dtype == torch.float32)
        return out, category, layers.dictionary_refinement(similarity, x.to(dtype), norm)

    return run, norm


# the last has more tokens than 256 tasks of the usual size
@needs_native
@pytest.mark.parametrize(
    'n, rank, entries, channels',
    [(1500, 8, 64, 48), (37, 5, 20, 36), (2, 8, 64, 48), (5, 8, 1, 24), (300, 4, 33, 7), (270_001, 2, 3, 2)],
)
def test_dictionary(target, n, rank, entries, channels):
    actual, expected = both(*dictionary(n, rank, entries, channels))
    assert_close(actual[0], expected[0])
    assert (actual[1] == expected[1]).double().mean() > 0.999  # a tie within rounding may fall either way
    assert_close(actual[2], expected[2], 1e-5)


@needs_native
@pytest.mark.parametrize('spread', [0.0, 1e-3, 1e-1])
def test_refinement_of_nearly_equal_tokens(target, spread):
    """A variance much smaller than the squared mean is not lost in rounding; no variance at all: the mean of x."""
    q = torch.ones(1, 3000, 4, dtype=torch.float64) + spread * random(1, 3000, 4)
    k, x = torch.eye(4, dtype=torch.float64)[None] * torch.tensor([9.0, 1, 1, 1])[:, None], random(1, 3000, 16)
    norm = randomise(nn.InstanceNorm1d(4, affine=True))

    def run(dtype, norm):
        similarity = layers.dictionary_attention(q.to(dtype), k.to(dtype), x[:, :4].to(dtype))[2]
        return layers.dictionary_refinement(similarity, x.to(dtype), norm)

    actual, expected = both(run, norm)
    assert_close(actual, expected, 2e-5)
    if spread == 0:
        assert_close(actual, x.mean(1, keepdim=True).expand_as(actual))


@needs_native
def test_refinement_of_many_equal_tokens(target):
    """A flat image: sums over very many tokens do not drift; nor do they where the first token is unlike the others."""
    n = 300_000
    q, x = torch.ones(1, n, 2, dtype=torch.float64), torch.full((1, n, 16), 0.3, dtype=torch.float64)
    k, norm = random(1, 5, 2), randomise(nn.InstanceNorm1d(5, affine=True))
    q[0, 0, 0], x[0, 0] = -50, 0.5

    def run(dtype, norm):
        similarity = layers.dictionary_attention(q.to(dtype), k.to(dtype), random(1, 5, 3).to(dtype))[2]
        return layers.dictionary_refinement(similarity, x.to(dtype), norm)

    assert_close(*both(run, norm), bound=2e-6)


@needs_native
@pytest.mark.parametrize('threads', [1, 2, 3])
def test_threads_and_batch(target, threads):
    """Bit for bit the same for any number of threads, and for an image alone."""
    conv, linear, norm = nn.Conv2d(48, 48, 7, padding=3, groups=48), nn.Linear(48, 60), nn.LayerNorm(48)
    norm3 = nn.InstanceNorm1d(20, affine=True)
    q, k, v, u = (random(2, *shape).float() for shape in ((5000, 8), (20, 8), (20, 48), (50, 100, 48)))

    def run(image):
        out, category, similarity = layers.dictionary_attention(q[image], k[image], v[image])
        refined = layers.dictionary_refinement(similarity, u[image].flatten(1, 2), norm3)
        maps = layers.depthwise_mix(u[image], conv), layers.linear_add(u[image], linear)
        return out, category, refined, *maps, *layers.norm_linear(u[image], norm, linear, linear, gelu=True)

    before = torch.get_num_threads()
    with torch.no_grad(), use_backend('native'):
        try:
            torch.set_num_threads(1)
            first, second = run(slice(0, 1)), run(slice(1, 2))
            torch.set_num_threads(threads)
            for whole, *parts in zip(run(slice(0, 2)), first, second):
                assert torch.equal(whole, torch.cat(parts))
        finally:
            torch.set_num_threads(before)


@needs_native
def test_nan_stays_visible(target):
    """A NaN reaches everything that depends on it, and nothing else."""
    linear, conv = nn.Linear(48, 48), nn.Conv2d(48, 48, 3, padding=1, groups=48)
    x, u = torch.zeros(1, 100, 48), torch.zeros(1, 9, 9, 48)
    x[0, 50, 7] = u[0, 4, 4, 20] = float('nan')
    q, k, v = torch.ones(1, 100, 8), torch.ones(1, 6, 8), torch.ones(1, 6, 48)
    q[0, 33] = float('nan')
    token, neighbours, asked = (torch.zeros(shape, dtype=torch.bool) for shape in (x.shape, u.shape, (1, 100, 48)))
    token[:, 50] = neighbours[0, 3:6, 3:6, 20] = asked[:, 33] = True
    with torch.no_grad(), use_backend('native'):
        out, _, similarity = layers.dictionary_attention(q, k, v)
        refined = layers.dictionary_refinement(similarity, x, nn.InstanceNorm1d(6, affine=True))
        assert torch.equal(layers.linear_add(x, linear).isnan(), token)
        assert torch.equal(layers.norm_linear(x, nn.LayerNorm(48), linear, gelu=True)[0].isnan(), token)
        assert torch.equal(layers.depthwise_mix(u, conv).isnan(), neighbours)
        assert torch.equal(out.isnan(), asked)
        assert refined.isnan().all()  # every entry is a mean over all tokens


@needs_native
@pytest.mark.parametrize('where', ['q', 'k', 'v', 'x', 'weight', 'bias'])
def test_nan_in_the_dictionary(target, where):
    tensors = {'q': random(1, 100, 8), 'k': random(1, 6, 8), 'v': random(1, 6, 48), 'x': random(1, 100, 48)}
    norm = nn.InstanceNorm1d(6, affine=True).double()
    tensors |= {'weight': norm.weight.data, 'bias': norm.bias.data}
    tensors[where].view(-1)[5] = float('nan')

    def run(dtype, norm):
        out, _, similarity = layers.dictionary_attention(*(tensors[name].to(dtype) for name in 'qkv'))
        return out.isnan(), layers.dictionary_refinement(similarity, tensors['x'].to(dtype), norm).isnan()

    actual, expected = both(run, norm)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))
    assert any(a.any() for a in actual)


@needs_native
def test_memory_of_any_layout(target):
    """Inputs that are views: another order of dimensions, a start anywhere in memory."""

    def odd(*shape):  # contiguous, but aligned to 4 bytes only
        return torch.randn(torch.Size(shape).numel() + 1)[1:].view(shape)

    with torch.no_grad(), use_backend('native'):
        linear, conv = nn.Linear(20, 33), nn.Conv2d(20, 20, 3, padding=1, groups=20)
        for p in (*linear.parameters(), *conv.parameters()):
            p.data = odd(*p.shape)
        x, add, u = odd(3, 20, 7).transpose(1, 2), odd(33, 3, 7).permute(1, 2, 0), odd(2, 20, 6, 9).permute(0, 2, 3, 1)
        assert torch.allclose(layers.linear_add(x, linear, add), linear(x) + add, atol=1e-5)
        expected = u + nn.functional.gelu(conv(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        assert torch.allclose(layers.depthwise_mix(u, conv), expected, atol=1e-5)
        q, k, v = odd(2, 5, 40).transpose(1, 2), odd(2, 5, 7).transpose(1, 2), odd(2, 7, 20)
        out, _, similarity = layers.dictionary_attention(q, k, v)
        norm = nn.InstanceNorm1d(7, affine=True)
        refined = layers.dictionary_refinement(similarity, odd(20, 2, 40).permute(1, 2, 0), norm)
        with use_backend('torch'):
            assert torch.allclose(layers.dictionary_attention(q, k, v)[0], out, atol=1e-5)
        assert refined.isfinite().all()


@needs_native
def test_operators_are_registered_properly():
    x, u = torch.randn(2, 5, 6, 16), torch.randn(2, 5, 6, 16)
    norm, linear, conv = nn.LayerNorm(16), nn.Linear(16, 20), nn.Conv2d(16, 16, 3, padding=1, groups=16)
    q, k, v = torch.randn(2, 30, 4), torch.randn(2, 7, 4), torch.randn(2, 7, 16)
    w, b = linear.weight.detach(), linear.bias.detach()
    add = torch.randn(2, 5, 6, 20)
    ops = torch.ops.ppsr
    calls = [
        (ops.linear, (x, [norm.weight.detach(), norm.bias.detach()], 1e-5, [w, w], [b, b], [], True)),
        (ops.linear, (x, [], 0.0, [w], [b], [add, add], False)),
        (ops.depthwise_mix, (u, conv.weight.detach(), conv.bias.detach())),
        (ops.dictionary_attention, (q, k, v)),
        (ops.dictionary_refinement, (q, k, x.flatten(1, 2), torch.ones(7), torch.zeros(7), 1e-5)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)


@needs_native
def test_operators_refuse_what_does_not_fit():
    """Called directly: a sentence, never memory that is not theirs."""
    x, w, b, ops = torch.randn(2, 30, 16), torch.randn(20, 16), torch.randn(20), torch.ops.ppsr
    q, k, v, u = torch.randn(2, 30, 4), torch.randn(2, 7, 4), torch.randn(2, 7, 16), torch.randn(1, 4, 5, 16)
    ones = torch.ones(7)
    for op, arguments in [
        (ops.linear, (x, [], 0.0, [w.double()], [b], [], False)),
        (ops.linear, (x, [], 0.0, [w], [b[:3]], [], False)),
        (ops.linear, (x[..., :8], [], 0.0, [w], [b], [], False)),
        (ops.linear, (x, [], 0.0, [w], [b], [b], False)),
        (ops.linear, (x, [], 0.0, [w], [b], 3 * [x.new_zeros(2, 30, 20)], False)),
        (ops.linear, (x, [], 0.0, 3 * [w], 3 * [b], [], False)),
        (ops.linear, (x[:0], [], 0.0, [w], [b], [], False)),
        (ops.depthwise_mix, (u[..., :8], torch.randn(8, 1, 3, 3), torch.randn(8))),
        (ops.depthwise_mix, (u, torch.randn(16, 1, 3, 5), torch.randn(16))),
        (ops.depthwise_mix, (u, torch.randn(16, 16, 3, 3), torch.randn(16))),
        (ops.dictionary_attention, (q, k[:1], v)),
        (ops.dictionary_attention, (q[:, :0], k, v)),
        (ops.dictionary_refinement, (q, k, x, ones[:5], ones, 1e-5)),
        (ops.dictionary_refinement, (q[:, :0], k, x[:, :0], ones, ones, 1e-5)),
    ]:
        with pytest.raises(ValueError, match='the operator takes'):
            op(*arguments)


@needs_native
def test_what_the_kernels_do_not_know_runs_in_pytorch():
    """The functions take all that their definitions take."""
    x, layer, norm = torch.randn(2, 30, 16), nn.Linear(16, 20), nn.LayerNorm(16)
    q, k, v, u = torch.randn(2, 30, 4), torch.randn(1, 7, 4), torch.randn(1, 7, 16), torch.randn(2, 9, 8, 16)
    statistics = nn.InstanceNorm1d(7, affine=True, track_running_stats=True).eval()
    nn.init.uniform_(statistics.running_mean)
    no_bias, over_two = nn.Linear(16, 20, bias=False), nn.LayerNorm((30, 16))
    mixed = {
        'added to every token': lambda: layers.linear_add(x, layer, torch.arange(20.0)),
        'three to add': lambda: layers.linear_add(x, layer, *3 * [torch.ones(2, 30, 20)]),
        'double to add': lambda: layers.linear_add(x, layer, torch.ones(2, 30, 20, dtype=torch.float64)),
        'no bias': lambda: layers.linear_add(x, no_bias),
        'three layers': lambda: torch.stack(layers.norm_linear(x, norm, layer, layer, layer)),
        'norm over two': lambda: layers.norm_linear(x, over_two, layer)[0],
        'norm without weights': lambda: layers.norm_linear(x, nn.LayerNorm(16, elementwise_affine=False), layer)[0],
        'one dictionary': lambda: layers.dictionary_attention(q, k, v)[0],
        'running statistics': lambda: layers.dictionary_refinement(
            layers.dictionary_attention(q[:1], k, v)[2], x[:1], statistics
        ),
        'no tokens': lambda: layers.dictionary_attention(q[:1, :0], k, v)[0],
        'no images': lambda: layers.linear_add(x[:0], layer),
    }
    torch.manual_seed(0)
    for name, kind in {
        'reflected': dict(padding=1, padding_mode='reflect'),
        'dilated': dict(padding=2, dilation=2),
        'full': dict(padding=1, groups=1),
    }.items():
        conv = nn.Conv2d(16, 16, 3, **{'groups': 16} | kind)
        mixed[name] = lambda conv=conv: layers.depthwise_mix(u, conv)
    for name, run in mixed.items():
        with torch.no_grad():
            with use_backend('native'):
                actual = run()
            with use_backend('torch'):
                expected = run()
        assert torch.equal(actual, expected), name


@needs_native
def test_they_count_as_many_multiplications_as_pytorch():
    net = PPATDLight(depths=[2], num_heads=[4]).eval()
    x = torch.full((1, 3, 16, 16), 0.4)
    counts = []
    for backend in ('native', 'torch'):
        with torch.no_grad(), use_backend(backend), flop_counter() as counter:
            net(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@needs_native
def test_whole_network(target):
    """All kernels of a layer together, odd sizes, part of the image pure."""
    torch.manual_seed(0)
    net = PPATDLight(
        embed_dim=36, depths=[3], num_heads=[3], num_tokens=20, reducted_dim=5, convffn_kernel_size=5, mlp_ratio=2
    ).eval()
    x = torch.rand(2, 3, 30, 21)
    x[:, :, :20, :15] = 0.5
    with torch.no_grad():
        with use_backend('native'):
            actual, mask = net(x, return_mask=True)
        expected = net.double()(x.double())
    assert 0.2 < mask.float().mean() < 0.8
    assert_close(actual, expected, 1e-5)


@needs_native
def test_kernels_step_aside():
    """Where a gradient is wanted, under autocast and under torch.compile the definition runs."""
    x, linear = torch.randn(1, 10, 16), nn.Linear(16, 16)
    with use_backend('native'):
        assert layers.linear_add(x, linear, x).requires_grad
        with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
            assert layers.linear_add(x, linear).dtype == torch.bfloat16
        with torch.no_grad(), use_backend('torch'):
            expected = layers.linear_add(x, linear, x)
        with torch.no_grad():
            compiled = torch.compile(lambda x: layers.linear_add(x, linear, x), backend='eager', fullgraph=True)
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
        expected = layers.linear_add(x, plain) + 1
        for module in (adapter, patched):
            assert torch.allclose(layers.linear_add(x, module), expected, atol=1e-6)
        layers.norm_linear(x, nn.LayerNorm(16), plain, hooked)
    assert seen


def test_similarity_is_kept_for_gradients():
    q, k, v = (t.requires_grad_() for t in (random(1, 5, 3), random(1, 4, 3), random(1, 4, 6)))
    out, _, similarity = layers.dictionary_attention(q, k, v)
    assert isinstance(similarity, Similarity)
    assert torch.allclose(similarity.matrix.sum(-1), torch.ones(1, 5, dtype=torch.float64))
    norm = nn.InstanceNorm1d(4, affine=True).double()

    def both_results(q, k, v):
        out, _, similarity = layers.dictionary_attention(q, k, v)
        return out, layers.dictionary_refinement(similarity, out, norm)

    assert torch.autograd.gradcheck(both_results, (q, k, v))
