"""Masked category attention (AC-MSA of ATD with a Pure-Pass mask).

- ``operator.py``: the function that a network calls and its registration with torch.library;
- ``reference.py``: the definition, a few readable lines; float64 for tests;
- ``torch.py``: vectorised PyTorch for any device;
- ``native.py``: the compiled CPU kernels (``ppsr/ops/native``);
- ``triton.py``: the CUDA kernels.

Each backend has ``forward`` and ``backward`` with the arguments of the two operators in ``operator.py``. Nothing else
is defined in this file: importing ``torch.py`` sets the package's attribute ``torch`` to the backend.
"""

from ppsr.ops.category_attention.operator import COMPENSATIONS, attention_macs, category_attention

__all__ = ['COMPENSATIONS', 'attention_macs', 'category_attention']
