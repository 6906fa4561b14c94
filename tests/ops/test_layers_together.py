"""All operators of a layer: threads, memory, what is not finite, registration, a whole network."""

import pytest
import torch
from flop_counter import flop_counter
from layer_kernels import assert_close, needs_native, random
from torch import nn

from ppsr.archs import PPATDLight, PPATDLightV2
from ppsr.ops import use_backend
from ppsr.ops.depthwise import depthwise_mix
from ppsr.ops.dictionary import dictionary_attention, dictionary_refinement
from ppsr.ops.linear import linear_add, norm_linear, norm_linear_beside
from ppsr.ops.some_linear import linear_some, norm_linear_some


@needs_native
@pytest.mark.parametrize('threads', [1, 2, 3])
def test_threads_and_batch(target, threads):
    """Bit for bit the same for any number of threads, and for an image alone."""
    conv, linear, norm = nn.Conv2d(48, 48, 7, padding=3, groups=48), nn.Linear(48, 60), nn.LayerNorm(48)
    norm3 = nn.InstanceNorm1d(20, affine=True)
    q, k, v, u = (random(2, *shape).float() for shape in ((5000, 8), (20, 8), (20, 48), (50, 100, 48)))

    def run(image):
        out, category, similarity = dictionary_attention(q[image], k[image], v[image])
        refined = dictionary_refinement(similarity, u[image].flatten(1, 2), norm3)
        maps = depthwise_mix(u[image], conv), linear_add(u[image], linear)
        beside = norm_linear_beside(u[image], norm, linear, k[0], category.view(-1, 50, 100))
        return out, category, refined, *maps, beside, *norm_linear(u[image], norm, linear, linear, gelu=True)

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
@pytest.mark.parametrize('threads', [1, 2])
def test_large_maps_are_those_of_small_pieces(target, threads, two_threads):
    """Bit for bit: those that no cache holds are written past the caches."""
    n, piece = 20000, 2500  # 48 channels: 3.8 MB and 0.5 MB
    x, add = random(1, n, 48).float(), random(1, n, 48, seed=1).float()
    norm, qkv, q, proj, narrow = nn.LayerNorm(48), *(nn.Linear(48, width) for width in (144, 8, 48, 30))
    some = torch.arange(n).view(1, n) // 30 % 3 != 0  # in and across chunks
    depthwise = nn.Conv2d(48, 48, 7, padding=3, groups=48)
    keys, values = random(1, 20, 8, seed=2).float(), random(1, 20, 48, seed=3).float()

    def run(part):
        x_part, add_part, some_part = x[:, part], add[:, part], some[:, part]
        queries, beside = norm_linear_some(x_part, norm, qkv, q, some_part, some_part)
        return (
            linear_add(x_part, proj, add_part, x_part),
            *norm_linear(x_part, norm, qkv, narrow, gelu=True),
            queries.where(some_part[..., None], queries.new_zeros(())),
            beside,
            linear_some(add_part.clone(), x_part, proj, some_part, add_part),
            depthwise_mix(x_part.view(-1, 50, 50, 48), depthwise).view(1, -1, 48),
            dictionary_attention(x_part[..., :8], keys, values)[0],
        )

    torch.set_num_threads(threads)
    with torch.no_grad(), use_backend('native'):
        pieces = [run(slice(start, start + piece)) for start in range(0, n, piece)]
        for whole, *parts in zip(run(slice(None)), *pieces):
            assert torch.equal(whole, torch.cat(parts, 1))


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
        out, _, similarity = dictionary_attention(q, k, v)
        refined = dictionary_refinement(similarity, x, nn.InstanceNorm1d(6, affine=True))
        assert torch.equal(linear_add(x, linear).isnan(), token)
        assert torch.equal(norm_linear(x, nn.LayerNorm(48), linear, gelu=True)[0].isnan(), token)
        assert torch.equal(depthwise_mix(u, conv).isnan(), neighbours)
        assert torch.equal(out.isnan(), asked)
        assert refined.isnan().all()  # every entry is a mean over all tokens


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
        assert torch.allclose(linear_add(x, linear, add), linear(x) + add, atol=1e-5)
        expected = u + nn.functional.gelu(conv(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        assert torch.allclose(depthwise_mix(u, conv), expected, atol=1e-5)
        q, k, v = odd(2, 5, 40).transpose(1, 2), odd(2, 5, 7).transpose(1, 2), odd(2, 7, 20)
        out, _, similarity = dictionary_attention(q, k, v)
        norm = nn.InstanceNorm1d(7, affine=True)
        refined = dictionary_refinement(similarity, odd(20, 2, 40).permute(1, 2, 0), norm)
        with use_backend('torch'):
            assert torch.allclose(dictionary_attention(q, k, v)[0], out, atol=1e-5)
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
        (ops.linear, (x, [], 0.0, [w], [b], [], True, torch.randn(7, 3), torch.randint(7, (2, 5, 6)))),
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
    ones, rows, row = torch.ones(7), torch.randn(7, 3), torch.arange(60).view(2, 30) % 7
    for op, arguments in [
        (ops.linear, (x, [], 0.0, [w.double()], [b], [], False)),
        (ops.linear, (x, [], 0.0, [w], [b[:3]], [], False)),
        (ops.linear, (x[..., :8], [], 0.0, [w], [b], [], False)),
        (ops.linear, (x, [], 0.0, [w], [b], [b], False)),
        (ops.linear, (x, [], 0.0, [w], [b], 3 * [x.new_zeros(2, 30, 20)], False)),
        (ops.linear, (x, [], 0.0, 3 * [w], 3 * [b], [], False)),
        (ops.linear, (x[:0], [], 0.0, [w], [b], [], False)),
        (ops.linear, (x, [], 0.0, [w], [b], [], True, rows, row + 1)),
        (ops.linear, (x, [], 0.0, [w], [b], [], True, rows, row - 1)),
        (ops.linear, (x, [], 0.0, [w], [b], [], True, rows, row.int())),
        (ops.linear, (x, [], 0.0, [w], [b], [], True, rows, row[:1])),
        (ops.linear, (x, [], 0.0, [w], [b], [], True, rows)),
        (ops.linear, (x, [], 0.0, [w], [b], [], True, rows.double(), row)),
        (ops.linear, (x, [], 0.0, [w], [b], [x.new_zeros(2, 30, 23)], True, rows, row)),
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
def test_they_count_as_many_multiplications_as_pytorch():
    """The formulas of the operators against what is counted of their definitions."""
    x, u, add = torch.randn(2, 30, 16), torch.randn(2, 5, 6, 16), torch.randn(2, 30, 20)
    norm, linear, conv = nn.LayerNorm(16), nn.Linear(16, 20), nn.Conv2d(16, 16, 3, padding=1, groups=16)
    q, k, v = torch.randn(2, 30, 4), torch.randn(2, 7, 4), torch.randn(2, 7, 16)
    w, b, ops, ones = linear.weight, linear.bias, torch.ops.ppsr, torch.ones(7)
    row = torch.randint(30, (2, 30))
    pairs = [
        (lambda: ops.linear(x, [], 0.0, [w, w], [b, b], [], True), lambda: norm_linear(x, norm, linear, linear)),
        (lambda: ops.linear(x, [], 0.0, [w], [b], [add], False), lambda: linear_add(x, linear, add)),
        (
            lambda: ops.linear(x, [], 0.0, [w], [b], [], True, q[0], row),
            lambda: norm_linear_beside(x, norm, linear, q[0], row),
        ),
        (lambda: ops.depthwise_mix(u, conv.weight, conv.bias), lambda: depthwise_mix(u, conv)),
        (lambda: ops.dictionary_attention(q, k, v), lambda: dictionary_attention(q, k, v)),
    ]
    similarity = dictionary_attention(q, k, v)[2]
    pairs.append(
        (
            lambda: ops.dictionary_refinement(q, k, x, ones, ones, 1e-5),
            lambda: dictionary_refinement(similarity, x, nn.InstanceNorm1d(7, affine=True)),
        )
    )
    for kernel, definition in pairs:
        counts = []
        for run in (kernel, definition):
            with torch.no_grad(), flop_counter() as counter:
                run()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


@needs_native
@pytest.mark.parametrize('arch', [PPATDLight, PPATDLightV2])
def test_whole_network(target, arch):
    """All kernels of a layer together, odd sizes, part of the image pure."""
    torch.manual_seed(0)
    net = arch(
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
