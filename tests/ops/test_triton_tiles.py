"""The tiles of the Triton kernels: compiled for two GPUs that need not be here, they fit."""

import functools
import importlib
import math
import os
import pathlib
import subprocess

import pytest
import torch

pytest.importorskip('triton', reason='triton is not installed')

DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
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
