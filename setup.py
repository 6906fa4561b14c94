"""Build of ppsr: pure Python, plus one optional shared library with the CPU kernels (see ppsr/ops/native)."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
about = {}
exec((here / 'ppsr' / 'version.py').read_text(), about)

setup(
    name='ppsr',
    version=about['__version__'],
    description='Pure-Pass for BasicSR: PP-ATD-light image super-resolution that skips the flat pixels',
    long_description=(here / 'README.md').read_text(encoding='utf-8') if (here / 'README.md').exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['ppsr', 'ppsr.*']),
    python_requires='>=3.10,<3.13',
    install_requires=[
        'torch>=2.4',
        'torchvision>=0.19',
        'numpy',
        'opencv-python',
        'pyyaml',
        'lmdb',
        'timm',
        'safetensors',
        'pillow',
        'tifffile',
        'tqdm',
        'matplotlib',
        'basicsr==1.4.2',
    ],
    extras_require={'test': ['pytest', 'pytest-timeout', 'hypothesis', 'ruff']},
    entry_points={'console_scripts': ['ppsr=ppsr.cli:main']},
)
