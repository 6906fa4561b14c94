"""Masks of the pixels that may skip expensive attention: one file each, found by name."""

from ppsr.masks.base import PixelMask, build_mask, list_masks, register_mask, settings_of
from ppsr.masks.both import Both
from ppsr.masks.controls import SameShare
from ppsr.masks.dynamic import Dynamic
from ppsr.masks.gradient import Gradient
from ppsr.masks.pure_pass import PurePass
from ppsr.masks.variance import Variance

__all__ = [
    'Both',
    'Dynamic',
    'Gradient',
    'PixelMask',
    'PurePass',
    'SameShare',
    'Variance',
    'build_mask',
    'list_masks',
    'register_mask',
    'settings_of',
]
