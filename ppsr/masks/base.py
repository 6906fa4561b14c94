"""What every mask is: :class:`PixelMask`, and the registry in which networks find masks by name.

A new mask is one file: a subclass, registered; ``pp_mask`` in the options of a network names it.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

__all__ = ['PixelMask', 'build_mask', 'list_masks', 'register_mask', 'require_threshold', 'settings_of']

_masks: dict[str, type['PixelMask']] = {}


class PixelMask(nn.Module, ABC):
    """Finds the pixels of LQ images that may skip expensive token mixing.

    Shape: (B, 3, H, W) RGB in [0, 1], any float dtype -> (B, H, W) bool, True = exempt. What an image gets must not
    depend on the other images of its batch, and should not depend on the device.

    Attributes:
        name: under which the mask is registered.
        period: rows after which the mask repeats itself, for images that are looked at in bands: the mask of rows that
            begin at a multiple of `period` is that of the whole image where one more period of rows on either side is
            there to see. None: the whole image has to be there.
    """

    name: ClassVar[str] = ''
    period: int | None = None

    @abstractmethod
    def forward(self, lq: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H, W) bool."""

    @abstractmethod
    def macs(self, height: int, width: int) -> int:
        """Multiply-adds that the mask itself takes for one image (docs/flops.md)."""

    def with_threshold(self, threshold: float) -> 'PixelMask':
        """The same mask with another threshold; the higher, the more is exempt.

        Raises:
            ValueError: the mask has none, or the value is out of range.
        """
        raise ValueError(f'the mask {self.name!r} has no threshold')

    def tint(self, lq: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H, W) RGB in [0, 1]: the colour that an overlay gives an exempt pixel."""
        return torch.tensor([0.9, 0.5, 0.1], dtype=lq.dtype, device=lq.device).view(1, 3, 1, 1).expand_as(lq)


def register_mask(name: str) -> Callable[[type[PixelMask]], type[PixelMask]]:
    """Class decorator: networks find the mask under this name. A reload replaces the entry.

    Raises:
        KeyError: the name belongs to another mask.
    """

    def decorate(cls: type[PixelMask]) -> type[PixelMask]:
        owner = _masks.get(name, cls)
        if (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
            raise KeyError(f'the mask {name!r} is already registered by {owner.__module__}.')
        cls.name, _masks[name] = name, cls
        return cls

    return decorate


def require_threshold(value) -> float:
    """A threshold for values in [0, 1] as a mask takes it.

    Raises:
        ValueError: not a number above 0 and at most 2.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 2:
        raise ValueError(f'threshold must be a number above 0 and at most 2, got {value!r}')
    return value


def list_masks() -> list[str]:
    """Names of the masks that are registered."""
    return list(_masks)


def settings_of(name: str) -> list[str] | None:
    """The settings that a registered mask takes, by name; None: it takes any."""
    parameters = inspect.signature(_masks[name]).parameters.values()
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else [p.name for p in parameters]


def build_mask(spec: str | Mapping = 'colour', **settings) -> PixelMask:
    """A mask by name.

    Args:
        spec: name of the mask, or a mapping with its name as `type` and settings of its own.
        **settings: further settings of it.

    Raises:
        ValueError: no such mask, a setting that it does not take, or a value that it refuses.

    >>> build_mask('colour', num_centers=5)
    PurePass(num_centers=5, window_size=5, shift=2, fuse=True)
    """
    own = dict(spec) if isinstance(spec, Mapping) else {'type': spec}
    name = own.pop('type', None)
    if not isinstance(name, str) or name not in _masks:
        raise ValueError(f'{name!r} is not a registered mask; those there are {", ".join(_masks)}.')
    takes = settings_of(name)
    for setting in settings | own:
        if takes is not None and setting not in takes:
            raise ValueError(f'the mask {name!r} takes no {setting!r}; it takes {", ".join(takes) or "nothing"}.')
    return _masks[name](**settings | own)
