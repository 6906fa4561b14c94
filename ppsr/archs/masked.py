"""The contract of the networks of this package: :class:`MaskedNetwork`, which may exempt pixels from expensive work.

A new network writes what it does with a padded image (:meth:`MaskedNetwork.restore`) and what that costs
(:meth:`MaskedNetwork.count`). Padding, mask, cropping, statistics, overlays, ``ppsr complexity``, tables and weight
files follow from the contract, and nobody outside ``ppsr/archs`` asks for a network by name or attribute.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ppsr.archs.window_compensation import WINDOW_COMPENSATIONS, ExemptingLayer
from ppsr.integrations.hub import HubNetwork
from ppsr.masks import PixelMask, build_mask
from ppsr.ops.category_attention import COMPENSATIONS
from ppsr.ops.workspace import reuse

__all__ = [
    'AS_PUBLISHED',
    'SCOPES',
    'HasAuxiliaryLosses',
    'MaskedNetwork',
    'PurePassOptions',
    'PurePassSettings',
    'as_masked',
    'mask_module',
    'mirror_pad',
    'reflect_pad',
    'require',
]

SCOPES = ('category', 'window')


def require(condition: bool, name: str, value, supported: str) -> None:
    """Refuse a constructor argument (ValueError) with a sentence that names it."""
    if not condition:
        raise ValueError(f'{name}={value!r} is not supported; it must be {supported}.')


def mirror_pad(x: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) at the bottom and right to a multiple, mirrored with the edge pixel repeated (as published)."""

    def index(size: int) -> Tensor:
        i = torch.arange(-(-size // multiple) * multiple, device=x.device) % (2 * size)
        return torch.where(i < size, i, 2 * size - 1 - i)

    h, w = x.shape[-2:]
    if h % multiple:
        x = x.index_select(-2, index(h))
    if w % multiple:
        x = x.index_select(-1, index(w))
    return x


def reflect_pad(x: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) at the bottom and right to a multiple, mirrored without the edge pixel, as often as it takes."""

    def index(size: int) -> Tensor:
        period = max(2 * (size - 1), 1)
        i = torch.arange(-(-size // multiple) * multiple, device=x.device) % period
        return torch.where(i < size, i, period - i)

    h, w = x.shape[-2:]
    if h % multiple:
        x = x.index_select(-2, index(h))
    if w % multiple:
        x = x.index_select(-1, index(w))
    return x


@dataclass(frozen=True)
class PurePassSettings:
    """What the ``pp_*`` options of a network say: which pixels are exempt, and what they get instead.

    Handed down to the layers as one object; each takes what concerns it.

    Attributes:
        mask: name of a registered mask, or a mapping with its `type` and settings of its own.
        num_centers, window_size, shift, fuse: of the mask (:class:`ppsr.PurePass`).
        threshold: of a mask that has one; None = its default.
        compensation: what an exempt token gets in place of category attention.
        scope: the attentions that pure tokens are exempt from, some of `SCOPES`.
        window_compensation: what an exempt token gets in place of window attention.

    Raises:
        ValueError: a value that is not supported, named as the option is.
    """

    mask: str | Mapping = 'colour'
    num_centers: int = 8
    window_size: int = 5
    shift: int | None = None
    fuse: bool = True
    threshold: float | None = None
    compensation: str = 'value'
    scope: Sequence[str] = ('category',)
    window_compensation: str = 'linear'

    # settings of the mask; only those that differ from their defaults are handed on, so that a mask without colours
    # works with the options of one that has them, as long as nobody changed what it cannot follow
    of_mask: ClassVar[tuple[str, ...]] = ('num_centers', 'window_size', 'shift', 'fuse', 'threshold')

    def __post_init__(self):
        for name, value, known in (
            ('pp_compensation', self.compensation, COMPENSATIONS),
            ('pp_window_compensation', self.window_compensation, WINDOW_COMPENSATIONS),
        ):
            require(value in known, name, value, ', '.join(known))
        require_scope(self.scope, SCOPES)

    def build_mask(self) -> PixelMask:
        defaults = {field.name: field.default for field in fields(self)}
        changed = {name: getattr(self, name) for name in self.of_mask if getattr(self, name) != defaults[name]}
        return build_mask(self.mask, **changed)


def require_scope(scope: Sequence[str], known: Sequence[str]) -> None:
    """Refuse (ValueError) a pp_scope that is not a list of some of what there is, each once."""
    fits = (
        isinstance(scope, (list, tuple)) and len(scope) > 0 and all(scope.count(s) == 1 and s in known for s in scope)
    )
    require(fits, 'pp_scope', scope, f'a list of {" and ".join(known)}' + (' or of one of them' if known[1:] else ''))


AS_PUBLISHED = PurePassSettings()


class MaskedNetwork(HubNetwork, nn.Module, ABC):
    """Base of the networks here. It owns padding, mask and cropping; a subclass writes :meth:`restore` and
    :meth:`count`.

    Args:
        upscale: factor.
        multiple: both sides of what :meth:`restore` sees are multiples of this.
        mask: finds the exempt pixels; None: the network exempts none.

    Shape: (B, 3, H, W) RGB in [0, 1], any H and W ≥ 1 -> (B, 3, upscale·H, upscale·W).

    Attributes:
        pure_pass: the mask, or None.
        title: name of the network in tables and captions.
        dense_arch: registered name of the network that has the same weights and exempts nothing; None: there is none
            but this one without its mask.
        scopes: attentions that pure pixels can be exempt from, as `pp_scope` names them.
        not_options: constructor arguments that are for Python (factories, objects), not for options files.
        auxiliary_weights: of :meth:`auxiliary_losses`, unless the options say otherwise.
        derived_buffers: names in the state dict that follow from the configuration: written for other programs, and
            neither kept nor asked for when weights are read.
    """

    title: ClassVar[str] = 'Network'
    dense_arch: ClassVar[str | None] = None
    scopes: ClassVar[tuple[str, ...]] = ('category',)
    not_options: ClassVar[tuple[str, ...]] = ('pure_pass', 'layer_fn', 'group_fn', 'group_norm')
    auxiliary_weights: ClassVar[dict[str, float]] = {}
    derived_buffers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, upscale: int, multiple: int = 1, mask: PixelMask | None = None):
        super().__init__()
        self.upscale, self.multiple = upscale, multiple
        self.pure_pass = mask

    # ------------------------------------------------------------------ what a network writes

    @abstractmethod
    def restore(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Padded images (B, 3, H', W'), mask of their exempt pixels (B, H', W') bool or None -> (B, 3, s·H', s·W')."""

    @abstractmethod
    def count(self, height: int, width: int, mask: Tensor) -> dict[str, int]:
        """Multiply-adds by part (docs/flops.md) of :meth:`restore` for padded images of H'×W' pixels with these masks
        (B, H', W') bool, all images together; those of finding the mask are not counted here."""

    def pad(self, lq: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H', W'), both sides multiples of `multiple`."""
        return mirror_pad(lq, self.multiple)

    @classmethod
    def config_from(cls, state_dict: Mapping[str, Tensor]) -> dict | None:
        """Constructor arguments of the network that these weights are from, as far as their shapes tell them; None if
        they are not from a network of this class. For weight files that do not say what they hold."""
        return None

    def does_without(self) -> set[str]:
        """Names of parameters that a weight file may have and this network, as it is configured, has no use for."""
        layers = ((name, m) for name, m in self.named_modules() if isinstance(m, ExemptingLayer))
        return {f'{layer}.{name}' for layer, m in layers for name in m.does_without()}

    # ------------------------------------------------------------------ what follows from it

    def pure_mask(self, x: Tensor) -> Tensor | None:
        """Mask (B, H', W') of padded images, or None where nothing is exempt."""
        return None if self.pure_pass is None else self.pure_pass(x)

    def mask_of(self, lq: Tensor) -> Tensor | None:
        """The mask (B, H', W') that the network uses for images (B, 3, H, W), or None; without a forward pass."""
        return self.pure_mask(self.pad(lq))

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """H' and W' of an image of height × width pixels."""
        return -(-height // self.multiple) * self.multiple, -(-width // self.multiple) * self.multiple

    def forward(self, lq: Tensor, return_mask: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) -> (B, 3, sH, sW); with `return_mask` also the mask used, (B, H', W') bool, or None.

        Raises:
            ValueError: a tensor of another shape.
        """
        if lq.dim() != 4 or lq.shape[1] != 3 or 0 in lq.shape:
            raise ValueError(f'the network takes (B, 3, H, W) with B, H, W ≥ 1, got {tuple(lq.shape)}')
        h, w = lq.shape[-2:]
        x = self.pad(lq)
        mask = self.pure_mask(x)  # once per image, for every layer
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # where memory is from is not to be recorded
        inference = not (torch.is_grad_enabled() or traced)
        with reuse() if inference else contextlib.nullcontext():
            sr = self.restore(x, mask)[..., : h * self.upscale, : w * self.upscale]
        return (sr, mask) if return_mask else sr

    def macs(self, height: int, width: int, pure: Tensor | None = None) -> dict[str, int]:
        """Multiply-adds by part for images of height × width LQ pixels.

        Args:
            height, width: of the LQ images, before padding.
            pure: (B, H', W') bool, the masks that :meth:`forward` used: counts these B images and what the mask takes.
                None: one image in the dense network, which computes no mask.
        """
        h, w = self.padded_size(height, width)
        if pure is None:
            return self.count(h, w, torch.zeros(1, h, w, dtype=torch.bool))
        macs = self.count(h, w, pure)
        if self.pure_pass is not None:
            macs['mask'] = pure.shape[0] * self.pure_pass.macs(h, w)
        return macs

    def exempt_nothing(self) -> 'MaskedNetwork':
        """Take the mask away: the network is dense from here on. Returns itself."""
        self.pure_pass = None
        return self

    def exempting_layers(self) -> list[ExemptingLayer]:
        """Its layers that may exempt tokens from window attention, from the first to the last."""
        return [m for m in self.modules() if isinstance(m, ExemptingLayer)]

    @contextlib.contextmanager
    def exempting(self, mask: PixelMask | None, scope: Sequence[str] | None = None) -> Iterator[None]:
        """Within a `with`, the network runs with another mask, or with none, and other attentions in its scope.

        A backward pass that computes layers anew (`use_checkpoint`) has to happen within, too.

        Args:
            mask: finds the exempt pixels; None: nothing is exempt.
            scope: attentions that they are exempt from, some of `scopes`; None: as it is.

        Raises:
            ValueError: a scope that the network has nothing to put in place of.
        """
        layers = self.exempting_layers()
        if scope is not None:
            require_scope(scope, self.scopes)
            if 'window' in scope and any(layer.comp is None for layer in layers):
                raise ValueError('the network was built without a stand-in for window attention: give it a pp_scope')
        before = self.pure_pass, [layer.scope for layer in layers]
        try:
            self.pure_pass = mask
            for layer in layers:
                layer.scope = layer.scope if scope is None else tuple(scope)
            yield
        finally:
            self.pure_pass, scopes = before
            for layer, scope in zip(layers, scopes):
                layer.scope = scope

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Further terms of the training loss by name, of the last forward; none here."""
        return {}


class PurePassOptions:
    """Gives a network the ``pp_*`` options: ``class PPNet(PurePassOptions, Net)``, where Net takes the settings as
    `pure_pass`.

    Args:
        pp_num_centers: K, number of colour centres of the mask (:class:`ppsr.PurePass`).
        pp_window_size: w, side of the windows of the mask.
        pp_shift: offset of the second grid; None = half the window.
        pp_fuse: cross-shift mask fusion.
        pp_compensation: what a pure token gets instead of attention: 'value' its own value vector through the
            projection; 'bypass' the value vector without the projection; 'zero' nothing.
        pp_scope: attentions that pure tokens are exempt from: 'category', 'window', as far as the network has them.
        pp_window_compensation: what a pure token gets instead of attention in its window, before the projection:
            'linear' a learned linear function of its input and of the mean of that around it; 'value' its own value
            vector; 'mean' the mean of the value vectors around it (:mod:`ppsr.archs.window_compensation`).
        pp_threshold: below which a pixel is flat, for values in [0, 1]: of the mask 'gradient' (None = 0.05), root mean
            squared distance from the neighbours; of 'variance' and 'both' (None = 0.07), standard deviation around it.
        pp_mask: 'colour', the paper's; 'gradient', 'variance', 'dynamic', 'both' (:mod:`ppsr.masks`); another
            registered mask (:func:`ppsr.masks.register_mask`), or a mapping with its `type` and settings of its own.
        **kwargs: those of the network.

    Raises:
        ValueError: a value that is not supported, named.
    """

    of_category: ClassVar[tuple[str, ...]] = ('pp_compensation',)  # no options of a network that has no such attention

    def __init__(
        self,
        pp_num_centers: int = 8,
        pp_window_size: int = 5,
        pp_shift: int | None = None,
        pp_fuse: bool = True,
        pp_compensation: str = 'value',
        pp_mask: str | Mapping = 'colour',
        pp_threshold: float | None = None,
        pp_scope: Sequence[str] = ('category',),
        pp_window_compensation: str = 'linear',
        **kwargs,
    ):
        require_scope(pp_scope, self.scopes)
        if 'category' not in self.scopes:
            require(pp_compensation == 'value', 'pp_compensation', pp_compensation, 'left out (no category attention)')
        settings = PurePassSettings(
            mask=pp_mask,
            num_centers=pp_num_centers,
            window_size=pp_window_size,
            shift=pp_shift,
            fuse=pp_fuse,
            threshold=pp_threshold,
            compensation=pp_compensation,
            scope=tuple(pp_scope),
            window_compensation=pp_window_compensation,
        )
        super().__init__(pure_pass=settings, **kwargs)

    @classmethod
    def config_from(cls, state_dict: Mapping[str, Tensor]) -> dict | None:
        """That of the network without a mask; with window attention in its scope if there is a learned stand-in."""
        config = super().config_from(state_dict)
        if config is not None and 'window' in cls.scopes and any('.comp.weight' in name for name in state_dict):
            config |= {'pp_scope': list(cls.scopes), 'pp_window_compensation': 'linear'}
        return config


@runtime_checkable
class HasAuxiliaryLosses(Protocol):
    """A network, anybody's, with further terms of the training loss: {name: scalar}, of the last forward."""

    def auxiliary_losses(self) -> dict[str, Tensor]: ...


def as_masked(net: nn.Module) -> MaskedNetwork | None:
    """The network if it keeps the contract, else None: other people's BasicSR networks run without statistics.

    Looks through torch.compile. This is the one place that decides.
    """
    net = getattr(net, '_orig_mod', net)
    return net if isinstance(net, MaskedNetwork) else None


def mask_module(net: nn.Module) -> PixelMask | None:
    """The mask of a network, anybody's, or None."""
    contract = as_masked(net)
    return None if contract is None else contract.pure_pass
