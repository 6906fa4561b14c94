"""The Triton kernels of category attention: by Triton's interpreter against the float64 reference, and on a GPU."""

import pytest
import torch

import ppsr.ops
from ppsr.ops.category_attention import category_attention, reference

pytest.importorskip('triton', reason='triton is not installed')

DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}

# name: (images, tokens, heads, head dim, group, categories, pure)
CASES = {
    'published sizes': (1, 130, 2, 12, 128, 64, 0.0),
    'group larger than a block, no power of two': (1, 210, 1, 12, 100, 7, 0.0),
    'fill reaches into the group before': (1, 33, 2, 12, 16, 3, 0.0),
    'one place to fill': (1, 31, 1, 16, 16, 3, 0.0),
    'groups without a rest': (1, 48, 1, 5, 16, 4, 0.0),
    'fewer tokens than a group': (1, 21, 2, 5, 128, 4, 0.3),
    'images differ in their pure share': (4, 41, 1, 12, 16, 5, (0.0, 0.3, 0.9, 1.0)),
    'everything pure': (1, 20, 2, 12, 16, 4, 1.0),
    'one token': (1, 1, 2, 12, 128, 4, 0.0),
    'one token of two images, one pure': (2, 1, 1, 5, 16, 4, (0.0, 1.0)),
    'one category': (2, 37, 1, 16, 16, 1, 0.4),
    'group of one': (1, 5, 1, 12, 1, 2, 0.2),
    'group of three': (1, 10, 1, 12, 3, 2, 0.2),
}


def _inputs(case, dtype, device='cpu'):
    images, n, heads, head_dim, size, categories, share = CASES[case]
    random = torch.Generator().manual_seed(n * size)
    qkv = torch.randn(images, n, 3 * heads * head_dim, generator=random).to(dtype)
    category = torch.randint(categories, (images, n), generator=random)
    share = torch.tensor(share).expand(images)[:, None]
    pure = torch.rand(images, n, generator=random) < share
    grad_out = torch.randn(images, n, heads * head_dim, generator=random).to(dtype)
    scale = torch.tensor([0.7])
    return *(x.to(device) for x in (qkv, category, pure, scale, grad_out)), heads, size


def _all_errors(case, dtype, keep, backend, device='cpu'):
    """Largest error of every result of a backend against the float64 reference, forward and backward."""
    qkv, category, pure, scale, grad_out, heads, size = _inputs(case, dtype, device)
    got = backend.forward(qkv, category, pure, scale, heads, size, keep)
    got += backend.backward(grad_out, qkv, *got, scale, heads, size, keep)
    want = reference.forward(qkv.double(), category, pure, scale.double(), heads, size, keep)
    want += reference.backward(grad_out.double(), qkv.double(), *want, scale.double(), heads, size, keep)
    names = ('out', 'lse', 'order', 'counts', 'grad_qkv', 'grad_scale')
    return {name: (g.double() - w).abs().max().item() for name, g, w in zip(names, got, want)}


def _interpret(case, dtype, keep):
    from ppsr.ops.category_attention import triton as backend

    return _all_errors(case, dtype, keep, backend)


@pytest.mark.parametrize(
    'case, keep', [(case, True) for case in CASES] + [('fewer tokens than a group', False), ('everything pure', False)]
)
def test_float32_agrees_with_the_definition(interpreter, case, keep):
    errors = interpreter(_interpret, case, torch.float32, keep)
    assert errors.pop('order') == errors.pop('counts') == 0
    assert errors.pop('grad_scale') < 5e-4  # a sum over all logits
    assert all(error < 5e-5 for error in errors.values()), errors


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('case', ['fill reaches into the group before', 'one category', 'fewer tokens than a group'])
def test_half_precision_errs_no_more_than_twice_as_much_as_plain_pytorch(interpreter, case, dtype):
    dtype = DTYPES[dtype]
    errors = interpreter(_interpret, case, dtype, True)
    plain = _all_errors(case, dtype, True, reference)
    assert errors['order'] == errors['counts'] == 0
    for name in ('out', 'lse', 'grad_qkv', 'grad_scale'):
        assert errors[name] <= 2 * plain[name], (name, errors, plain)


def _operator(case, strided):
    """Results and gradients of the public function, by the Triton backend and in float64."""
    qkv, category, pure, scale, grad_out, heads, size = _inputs(case, torch.float32)
    if strided:  # channels first in memory, as a convolution without channels_last leaves them
        qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
        grad_out = grad_out[..., :1].expand_as(grad_out)
    results = []
    for backend, dtype in (('triton', torch.float32), ('reference', torch.float64)):
        x, s = qkv.to(dtype).requires_grad_(), scale.to(dtype).requires_grad_()
        with ppsr.ops.use_backend(backend):
            out = category_attention(x, category, s, num_heads=heads, category_size=size, pure=pure)
            results.append((out, *torch.autograd.grad(out, (x, s), grad_out.to(dtype))))
    return [tuple(x.detach().double() for x in result) for result in results]


@pytest.mark.parametrize('strided', [False, True], ids=['contiguous', 'channels first'])
def test_operator_with_autograd(interpreter, strided):
    got, want = interpreter(_operator, 'images differ in their pure share', strided)
    for name, g, w in zip(('out', 'grad_qkv', 'grad_scale'), got, want):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f'{name}: {text}')


def _opcheck():
    qkv, category, pure, scale, _, heads, size = _inputs('one token of two images, one pure', torch.float32)
    args = (qkv.requires_grad_(), category, pure, scale.requires_grad_(), heads, size, True)
    with ppsr.ops.use_backend('triton'):
        return torch.library.opcheck(torch.ops.ppsr.category_attention.default, args)


def test_opcheck(interpreter):
    checks = interpreter(_opcheck)
    assert checks and set(checks.values()) == {'SUCCESS'}


def _no_token():
    from ppsr.ops.category_attention import triton as backend

    qkv, category, scale = torch.zeros(2, 0, 36), torch.zeros(2, 0, dtype=torch.long), torch.ones(())
    out, lse, order, counts = backend.forward(qkv, category, None, scale, 1, 16, True)
    grads = backend.backward(out, qkv, out, lse, order, counts, scale, 1, 16, True)
    return out.shape, counts.tolist(), grads[0].shape, grads[1].item()


def test_no_token(interpreter):
    assert interpreter(_no_token) == ((2, 0, 12), [0, 0], (2, 0, 36), 0.0)


def _host_operators():
    """Names of the PyTorch operators that the host calls in a forward and a backward, kernels left out."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from ppsr.ops.category_attention import triton as backend

    class Record(TorchDispatchMode):
        names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    class NoKernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    qkv, category, pure, scale, grad_out, heads, size = _inputs('images differ in their pure share', torch.float32)
    with pytest.MonkeyPatch.context() as patch, Record():
        for name in ('_forward_kernel', '_query_gradient_kernel', '_key_gradient_kernel'):
            patch.setattr(backend, name, NoKernel())
        got = backend.forward(qkv, category, pure, scale, heads, size, True)
        backend.backward(grad_out, qkv, *got, scale, heads, size, True)
    return Record.names


def test_host_reads_nothing_back_and_sorts_once(interpreter):
    names = interpreter(_host_operators)
    assert sum('sort' in name for name in names) == 1
    waiting = ('_local_scalar_dense', 'item', 'nonzero', 'equal.default', 'index', 'masked_select', 'repeat_interleave')
    assert not [name for name in names if any(word in name for word in waiting)]


# --- On a GPU --------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')


@needs_gpu
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('case', CASES)
def test_on_a_gpu(case, dtype):
    from ppsr.ops.category_attention import triton as backend

    errors = _all_errors(case, DTYPES[dtype], True, backend, 'cuda')
    plain = _all_errors(case, DTYPES[dtype], True, reference, 'cuda')
    assert errors['order'] == errors['counts'] == 0
    for name in ('out', 'lse', 'grad_qkv', 'grad_scale'):
        assert errors[name] <= 2 * plain[name] + 1e-4, (name, errors, plain)


@needs_gpu
def test_cuda_graph_follows_new_masks_and_a_new_scale():
    from ppsr.ops.category_attention import triton as backend

    qkv, category, pure, scale, grad_out, heads, size = _inputs(
        'images differ in their pure share', torch.float32, 'cuda'
    )

    def both():
        got = backend.forward(qkv, category, pure, scale, heads, size, True)
        return *got, *backend.backward(grad_out, qkv, *got, scale, heads, size, True)

    both()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # any wait for the device would end the capture with an error
        captured = both()
    pure.copy_(pure.roll(1, 0))
    qkv.copy_(qkv.flip(1))
    scale.fill_(1.3)
    graph.replay()
    for got, want in zip(captured, both()):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
