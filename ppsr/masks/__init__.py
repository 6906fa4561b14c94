"""Masks of the pixels that may skip expensive attention."""

from ppsr.masks.pure_pass import PurePass

__all__ = ['PurePass']
