"""Shifted-window attention on CUDA: the PyTorch backend, for F.scaled_dot_product_attention is one kernel there."""

from ppsr.ops.window_attention.torch import backward, forward

__all__ = ['backward', 'forward']
