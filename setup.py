"""Build of ppsr: pure Python, plus one optional shared library with the CPU kernels (see ppsr/ops/native)."""

import os
import platform
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

here = Path(__file__).parent
about = {}
exec((here / 'ppsr' / 'version.py').read_text(), about)

NATIVE = 'ppsr/ops/native'
X86_64 = platform.machine().lower() in ('x86_64', 'amd64')
LOOPS = ['runtime', 'groups', 'windows', 'categories', 'layers', 'training']
# compiled once for each of the targets; the library takes the best one that the processor has
KERNELS = ['attention_kernels', 'layer_kernels', 'training_kernels']
TARGETS = {'baseline': []}
if X86_64:
    TARGETS |= {'avx2': ['-mavx2', '-mfma'], 'avx512': ['-mavx512f', '-mfma']}
# kernels of a forward pass, compiled to multiply bfloat16 as well: with instructions for it, emulated for tests
FORWARD = ['attention_kernels', 'layer_kernels']
AVX512_BF16 = ['-mavx512f', '-mfma', '-mavx512bw', '-mavx512bf16']


def paths(names, suffix='.c'):
    return [f'{NATIVE}/{name}{suffix}' for name in names]


class BuildKernels(build_ext):
    """Builds the CPU kernels, a plain C library: no headers of Python or torch, one file for every version of both."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split('.')) + '.so'

    def build_extension(self, ext):
        flags = ['-O3', '-g0', '-std=gnu11', '-fPIC', '-Wno-psabi', '-fno-math-errno']

        def compile(files, folder, options=(), **macros):
            folder = os.path.join(self.build_temp, folder)
            return self.compiler.compile(
                paths(files), folder, macros=list(macros.items()), extra_postargs=[*flags, *options]
            )

        objects, have = compile(FORWARD, 'emulated_bf16', TARGET='emulated_bf16', BFLOAT16='1'), {}
        for target, options in TARGETS.items():
            objects += compile(KERNELS, target, options, TARGET=target)
        if X86_64:
            try:
                objects += compile(FORWARD, 'avx512_bf16', AVX512_BF16, TARGET='avx512_bf16', BFLOAT16='1')
                have['HAVE_AVX512_BF16'] = '1'
            except CompileError:
                self.warn(
                    'the C compiler does not know AVX512-BF16 (gcc 10, clang 9): bf16 will be computed in float32'
                )
        objects += compile(LOOPS, 'loops', **have)
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name), libraries=['m'])

    def run(self):
        super().run()
        built = all(os.path.exists(path) for path in self.get_outputs())
        self.warn(
            'the CPU kernels are built: ppsr will run its "native" backend'
            if built
            else 'no working C compiler (gcc or clang), so there are no CPU kernels: ppsr will run its "torch" backend'
        )


class BuildPackage(build_py):
    """Takes the shipped weights and options files into the package; ppsr/shipped.py finds them there."""

    def shipped(self):
        """(file in the repository, path in the build folder)"""
        weights = here.glob('experiments/pretrained_models/*.safetensors')
        pairs = [(path, f'ppsr/pretrained_models/{path.name}') for path in weights]
        pairs += [(path, f'ppsr/{path.relative_to(here)}') for path in here.glob('options/**/*.yml')]
        return [(path, os.path.join(self.build_lib, target)) for path, target in sorted(pairs)]

    def run(self):
        super().run()
        if not self.editable_mode:  # there they are found where they lie
            for path, target in self.shipped():
                self.mkpath(os.path.dirname(target))
                self.copy_file(str(path), target)

    def get_outputs(self, include_bytecode=True):
        own = [] if self.editable_mode else [target for _, target in self.shipped()]
        return super().get_outputs(include_bytecode) + own

    def get_source_files(self):  # what an sdist holds
        return super().get_source_files() + [str(path.relative_to(here)) for path, _ in self.shipped()]


class Wheel(bdist_wheel):
    """Tags the wheel for every Python 3 of its platform: the library does not depend on Python's version."""

    def get_tag(self):
        return 'py3', 'none', super().get_tag()[2]


setup(
    name='ppsr',
    version=about['__version__'],
    description='Pure-Pass for BasicSR: PP-ATD-light image super-resolution that skips the flat pixels',
    long_description=(here / 'README.md').read_text(encoding='utf-8') if (here / 'README.md').exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['ppsr', 'ppsr.*']),
    py_modules=['ppsr_command'],  # where the command starts, outside of the package
    ext_modules=[
        Extension(
            'ppsr.ops.native.libppsr',
            paths(LOOPS + KERNELS),
            depends=paths(['groups', 'kernels', 'products', 'runtime', 'simd', 'training'], '.h'),
            optional=True,  # without a compiler the package still installs
        )
    ],
    cmdclass={'build_ext': BuildKernels, 'build_py': BuildPackage, 'bdist_wheel': Wheel},
    python_requires='>=3.10,<3.13',
    install_requires=[
        'torch>=2.4',
        'torchvision>=0.19',
        'numpy',
        'scipy<2',  # basicsr imports scipy.ndimage.filters, which SciPy 2 drops
        'opencv-python',
        'pyyaml',
        'pydantic>=2.11',
        'lmdb',
        'timm',
        'safetensors',
        'pillow',
        'tifffile',
        'imagecodecs',
        'psutil',
        'tqdm',
        'matplotlib',
        'basicsr==1.4.2',
    ],
    extras_require={
        'spandrel': ['spandrel>=0.4.2'],
        'teacher': ['spandrel>=0.4.2'],  # distillation from networks of other packages
        'export': ['onnx>=1.17', 'onnxscript>=0.5', 'onnxruntime>=1.20'],
        'executorch': ['executorch>=1.0'],
        'hub': ['huggingface_hub>=0.24'],
        'web': ['gradio>=6'],
        'video': ['av>=18'],
        'test': [
            "av>=18; python_version >= '3.11'",  # there is none for 3.10: these tests are skipped there
            'pytest',
            'pytest-timeout',
            'pytest-xdist',
            'hypothesis',
            'ruff',
            'spandrel>=0.4.2',
            'huggingface_hub>=0.24',
            'onnx>=1.17',
            'onnxscript>=0.5',
            'onnxruntime>=1.20',
            'gradio>=6',
            'selenium>=4.20',  # the page in Debian's Chromium (packages chromium, chromium-driver); skipped without
        ],
    },
    entry_points={'console_scripts': ['ppsr=ppsr_command:entry']},
)
