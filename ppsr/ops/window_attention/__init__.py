"""Shifted-window attention with a relative position bias (SW-MSA): the same files as in category_attention."""

from ppsr.ops.window_attention.operator import attention_macs, window_attention

__all__ = ['attention_macs', 'window_attention']
