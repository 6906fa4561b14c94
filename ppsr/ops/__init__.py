"""Attention operators with several backends; see ``dispatch.py`` for how one is chosen."""

from ppsr.ops.category_attention import category_attention
from ppsr.ops.dispatch import use_backend
from ppsr.ops.window_attention import window_attention

__all__ = ['category_attention', 'use_backend', 'window_attention']
