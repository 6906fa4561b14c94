"""Masks of the pixels that may skip expensive attention: one file each, found by name."""

from ppsr.masks.base import PixelMask, build_mask, list_masks, register_mask
from ppsr.masks.controls import SameShare
from ppsr.masks.pure_pass import PurePass

__all__ = ['PixelMask', 'PurePass', 'SameShare', 'build_mask', 'list_masks', 'register_mask']
