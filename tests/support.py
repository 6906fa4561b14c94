"""What several test files share: the repository, a small network, and what lies beside the repository."""

import os
from pathlib import Path

import pytest

from ppsr.ops import native
from ppsr.pictures import side_by_side

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = REPOSITORY / 'tests' / 'golden'
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
needs_kernels = pytest.mark.skipif(
    native.unavailable_reason() is not None or side_by_side._runtime() is None, reason='compiled kernels and OpenMP'
)


def shared(*parts: str) -> Path:
    """A file or folder beside the repository, or a skip that says what is missing."""
    root = Path(os.environ['PPSR_DATA']).parent if 'PPSR_DATA' in os.environ else REPOSITORY.parent / 'shared'
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f'{"/".join(parts)} is not here (set PPSR_DATA to the folder that holds Set5, Set14, …)')
    return path
