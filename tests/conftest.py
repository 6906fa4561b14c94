"""Shared fixtures. Data sets that are not part of the repository are looked for in PPSR_DATA or ../shared/data."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest
import torch

import ppsr  # noqa: F401, registers archs and models
from ppsr.ops import native

REPOSITORY = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile('ppsr', deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile('ppsr')

os.environ.setdefault('PPSR_NO_TUNING', '1')  # main() in a test must not flush this process's denormals

# as in a terminal: a shell that starts the tests in the background has Ctrl-C ignored, and children inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = dict(
    embed_dim=16,
    depths=[2, 2],
    num_heads=[2, 2],
    window_size=8,
    category_size=16,
    num_tokens=8,
    reducted_dim=4,
    convffn_kernel_size=5,
    upscale=2,
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> dict:
    """Constructor arguments of a network that runs in milliseconds (the one of golden_tiny_x2)."""
    return dict(TINY)


@pytest.fixture(params=['baseline', 'avx2', 'avx512'])
def target(request):
    """Each instruction set of the compiled kernels that this processor has."""
    if not native.set_target(request.param):
        pytest.skip(f'this processor has no {request.param}')
    yield request.param
    native.set_target(None)


def shared(*parts: str) -> Path:
    """A file or folder beside the repository, or a skip that says what is missing."""
    root = Path(os.environ['PPSR_DATA']).parent if 'PPSR_DATA' in os.environ else REPOSITORY.parent / 'shared'
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f'{"/".join(parts)} is not here (set PPSR_DATA to the folder that holds Set5, Set14, …)')
    return path
