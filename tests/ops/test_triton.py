"""The Triton kernels without a GPU: run by Triton's interpreter against the float64 reference, compiled for two GPUs.

Triton decides on import whether its kernels are interpreted: the interpreter runs in a process with an environment of
its own, and this process compiles. The tests at the end need a GPU.
"""

import concurrent.futures
import functools
import importlib
import math
import multiprocessing
import os
import pathlib
import subprocess

import pytest
import torch

import ppsr.ops
from ppsr.ops.category_attention import category_attention, reference
from ppsr.ops.window_attention import reference as window_reference
from ppsr.ops.window_attention import window_attention

pytest.importorskip('triton', reason='triton is not installed')

DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}


@pytest.fixture(scope='module')
def interpreter():
    """interpreter(function, *args): the result of a function of this file, called in a process that interprets."""
    with (
        pytest.MonkeyPatch.context() as patch,
        concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context('spawn'), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
    ):
        patch.setenv('TRITON_INTERPRET', '1')
        pool.submit(int).result()  # the process starts here, and inherits the environment
        patch.undo()
        yield lambda function, *args: pool.submit(function, *args).result()


# --- In the interpreter ----------------------------------------------------------------------------------------------

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

    for name in ('_forward_kernel', '_query_gradient_kernel', '_key_gradient_kernel'):
        setattr(backend, name, NoKernel())
    qkv, category, pure, scale, grad_out, heads, size = _inputs('images differ in their pure share', torch.float32)
    with Record():
        got = backend.forward(qkv, category, pure, scale, heads, size, True)
        backend.backward(grad_out, qkv, *got, scale, heads, size, True)
    return Record.names


def test_host_reads_nothing_back_and_sorts_once(interpreter):
    names = interpreter(_host_operators)
    assert sum('sort' in name for name in names) == 1
    waiting = ('_local_scalar_dense', 'item', 'nonzero', 'equal.default', 'index', 'masked_select', 'repeat_interleave')
    assert not [name for name in names if any(word in name for word in waiting)]


# name: (images, height, width, heads, head dim, window, shift)
WINDOWS = {
    'no shift': (1, 6, 12, 1, 12, 6, 0),
    'two images, two heads': (2, 4, 8, 2, 5, 4, 2),
    'shift by one, blocks without a pair': (1, 9, 18, 1, 16, 9, 1),
    'side no power of two, one column of windows': (1, 14, 7, 1, 12, 7, 3),
    'windows of one': (1, 2, 2, 1, 5, 1, 0),
}


def _window_inputs(case, dtype, device='cpu'):
    images, height, width, heads, head_dim, size, shift = WINDOWS[case]
    random = torch.Generator().manual_seed(height * width)
    qkv = torch.randn(images, height, width, 3 * heads * head_dim, generator=random).to(dtype)
    table = torch.randn((2 * size - 1) ** 2, heads, generator=random)
    grad_out = torch.randn(images, height, width, heads * head_dim, generator=random).to(dtype)
    return *(x.to(device) for x in (qkv, table, grad_out)), heads, size, shift


def _window_errors(case, dtype, backend, device='cpu', share=None):
    """Largest error of every result of a backend against the float64 reference, forward and backward."""
    qkv, table, grad_out, *sizes = _window_inputs(case, dtype, device)
    pure = None if share is None else _window_mask(qkv, share)
    got = backend.forward(qkv, table, pure, *sizes)
    got += backend.backward(grad_out, qkv, *got, table, pure, *sizes)
    want = window_reference.forward(qkv.double(), table.double(), pure, *sizes)
    want += window_reference.backward(grad_out.double(), qkv.double(), *want, table.double(), pure, *sizes)
    names = ('out', 'lse', 'grad_qkv', 'grad_table')
    return {name: (g.double() - w).abs().max().item() for name, g, w in zip(names, got, want)}


def _window_mask(qkv, share):
    """A share of the tokens pure, the last images wholly."""
    pure = torch.rand(qkv.shape[:3], generator=torch.Generator().manual_seed(3)) < share
    pure[1:] = True
    return pure.to(qkv.device)


def _interpret_window(case, dtype, share=None):
    from ppsr.ops.window_attention import triton as backend

    return _window_errors(case, dtype, backend, share=share)


@pytest.mark.parametrize('share', [None, 0.0, 0.6], ids=['dense', 'nothing pure', 'some pure'])
@pytest.mark.parametrize('case', WINDOWS)
def test_window_attention_agrees_with_the_definition(interpreter, case, share):
    errors = interpreter(_interpret_window, case, torch.float32, share)
    assert all(error < 2e-5 for error in errors.values()), errors


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_window_attention_in_half_precision_errs_no_more_than_twice_as_much(interpreter, dtype):
    case, dtype = 'side no power of two, one column of windows', DTYPES[dtype]
    errors = interpreter(_interpret_window, case, dtype)
    plain = _window_errors(case, dtype, window_reference)
    for name, error in errors.items():
        assert error <= 2 * plain[name], (name, errors, plain)


def _window_operator():
    """opcheck, and results and gradients of the public function by the Triton backend and in float64."""
    qkv, table, grad_out, heads, size, shift = _window_inputs('windows of one', torch.float32)
    results = []
    for backend, dtype in (('triton', torch.float32), ('reference', torch.float64)):
        x, bias = qkv.to(dtype).requires_grad_(), table.to(dtype).requires_grad_()
        with ppsr.ops.use_backend(backend):
            out = window_attention(x, bias, num_heads=heads, window_size=size, shift=shift)
            results.append((out, *torch.autograd.grad(out, (x, bias), grad_out.to(dtype))))
            if backend == 'triton':
                checks = torch.library.opcheck(
                    torch.ops.ppsr.window_attention.default, (x, bias, None, heads, size, shift)
                )
    return checks, [tuple(x.detach().double() for x in result) for result in results]


def test_window_operator_with_autograd_and_opcheck(interpreter):
    checks, (got, want) = interpreter(_window_operator)
    assert checks and set(checks.values()) == {'SUCCESS'}
    for name, g, w in zip(('out', 'grad_qkv', 'grad_table'), got, want):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f'{name}: {text}')


# --- Compiled for a GPU that is not here -----------------------------------------------------------------------------

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one block may use (CUDA C++ Programming Guide, ch. 20)
KERNELS = {
    'category_attention': ('_forward_kernel', '_query_gradient_kernel', '_key_gradient_kernel'),
    'window_attention': ('_forward_kernel', '_query_gradient_kernel', '_key_gradient_kernel', '_bias_gradient_kernel'),
}
# the two 16-bit types differ in nothing but the name of an instruction: one on each
TARGETS = ((80, 'float32'), (90, 'float32'), (80, 'float16'), (90, 'bfloat16'))
COMPILED = [(op, name, *target) for op, names in KERNELS.items() for name in names for target in TARGETS]
# types of the arguments that are neither strides and sizes (i32) nor tensors in the dtype of qkv
TYPES = {'category_attention': {'scale': '*fp32'}, 'window_attention': {'scale': 'fp32'}}
for _types in TYPES.values():
    _types.update(dict.fromkeys(('order', 'counts'), '*i32'))
    _types['pure'] = '*i1'
    _types.update(dict.fromkeys(('lse', 'delta', 'table', 'grad_scale', 'grad_bias'), '*fp32'))


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    if os.environ.get('TRITON_INTERPRET') == '1':
        pytest.skip('TRITON_INTERPRET=1: nothing is compiled in this process')
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))  # nothing left over from another version
    return functools.partial(_compile, tmp_path)


def _compile(folder, op, name, dtype, head_dim, group, capability):
    """Shared memory, registers a thread, bytes spilled and warps of a kernel as the launcher would compile it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ppsr.ops import triton_tiles as tiles

    backend = importlib.import_module(f'ppsr.ops.{op}.triton')
    kernel = getattr(backend, name)
    largest = (backend.LARGEST_BLOCK,) if op == 'window_attention' else ()
    constants = tiles.config(dtype, head_dim, group, *largest)
    options = {key: constants.pop(key) for key in ('num_warps', 'num_stages')}
    constants |= {'NUM_HEADS': 4, 'HEAD_DIM': head_dim, 'CATEGORY_SIZE': group, 'WINDOW': math.isqrt(group)}
    constants |= {'KEEP': True, 'MASKED': True, 'stride_c': 1, 'grad_stride_c': 1}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    element = {torch.float32: '*fp32', torch.float16: '*fp16', torch.bfloat16: '*bf16'}[dtype]
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        number = argument.startswith(('num_', 'stride', 'grad_stride', 'height', 'width', 'shift'))
        signature[argument] = 'i32' if number else TYPES[op].get(argument, element)
        if argument in constants:
            signature[argument] = 'constexpr'
        elif signature[argument].startswith('*') or 'stride' in argument:  # multiples of 16 in a network
            attributes[(i,)] = [['tt.divisibility', 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)

    cubin = folder / f'{name}.cubin'
    cubin.write_bytes(compiled.asm['cubin'])
    tool = pathlib.Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    usage = subprocess.run([tool, '--dump-resource-usage', cubin], capture_output=True, text=True, check=True).stdout
    usage = dict(field.split(':') for line in usage.splitlines() if 'REG:' in line for field in line.split())
    return compiled.metadata.shared, int(usage['REG']), int(usage['STACK']) + int(usage['LOCAL']), options['num_warps']


@pytest.mark.parametrize('op, name, capability, dtype', COMPILED)
def test_compiled_kernel_fits(compiled, op, name, capability, dtype):
    group = 128 if op == 'category_attention' else 256
    shared, registers, spilled, warps = compiled(op, name, DTYPES[dtype], 12, group, capability)
    assert 0 < registers <= 255
    assert spilled == 0
    # a multiprocessor has 65,536 registers: at least eight warps run at a time, whatever else limits them
    blocks = min(SHARED_MEMORY[capability] // shared, 65536 // (registers * 32 * warps))
    assert blocks * warps >= 8, (shared, registers, warps)


@pytest.mark.parametrize('head_dim, category_size', [(12, 16), (64, 128)])
def test_other_sizes_fit_too(compiled, head_dim, category_size):
    shared, registers, spilled, _ = compiled(
        'category_attention', '_key_gradient_kernel', torch.float16, head_dim, category_size, 80
    )
    assert shared <= 48 * 1024 and registers <= 255 and spilled <= 256


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
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('case', WINDOWS)
def test_window_attention_on_a_gpu(case, dtype):
    from ppsr.ops.window_attention import triton as backend

    errors = _window_errors(case, DTYPES[dtype], backend, 'cuda')
    plain = _window_errors(case, DTYPES[dtype], window_reference, 'cuda')
    for name, error in errors.items():
        assert error <= 2 * plain[name] + 1e-4, (name, errors, plain)


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
