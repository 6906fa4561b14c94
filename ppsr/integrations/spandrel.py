"""Our networks for programs that load weights with spandrel (ComfyUI, chaiNNer and others): docs/integrations.md.

:func:`install` puts them into spandrel's registry, in front of spandrel's own ATD: weights of ATD-light then run in our
network, with Pure-Pass. spandrel hands on parameters alone, so what leaves no trace in them (category_size, the
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor

from ppsr.archs.build import as_arch, build_network, dense_variant, title_of
from ppsr.device import resolve_device, torch_defaults
from ppsr.errors import UserError
from ppsr.extras import need
from ppsr.weights import (
    Checkpoint,
    build_and_load,
    described,
    guess_config,
    is_ours,
    read_checkpoint,
    require_shapes,
    resolve,
    without_derived,
)

(spandrel,) = need('spandrel', 'ppsr.integrations.spandrel', 'spandrel')

__all__ = ['PurePassArchitecture', 'install', 'load']

# spandrel's own architectures whose weights ours take, too
BEFORE = ('ATD', 'SwinIR')


class PurePassArchitecture(spandrel.Architecture):
    """One of our networks as spandrel sees it.

    Args:
        arch: registered name of the network, the id for spandrel.
        pure_pass: False runs the weights with nothing exempted.
    """

    def __init__(self, arch: str, pure_pass: bool = True):
        super().__init__(id=arch, name=ARCH_REGISTRY.get(arch).title, detect=self._fits)
        self.pure_pass = pure_pass

    def _fits(self, state_dict: Mapping[str, Tensor]) -> bool:
        """Whether these are the parameters of this network, all of them and no other."""
        if 'category' not in ARCH_REGISTRY.get(self.id).scopes and not any('.comp.' in name for name in state_dict):
            return False  # without window attention weights lose, unless they have learned what stands in for it
        try:
            checkpoint = self._checkpoint(state_dict)
            require_shapes(lambda: build_network(checkpoint.config), checkpoint)
        except UserError:
            return False
        return True

    def _checkpoint(self, state_dict: Mapping[str, Tensor]) -> Checkpoint:
        state = without_derived(state_dict)
        return Checkpoint(state, guess_config(state, self.id), path=Path('the weights'))

    def load(self, state_dict: Mapping[str, Tensor]) -> 'spandrel.ImageModelDescriptor':
        """The network with these parameters, in eval mode on the CPU.

        Raises:
            UserError: they are not its parameters.
        """
        return self.describe(self._checkpoint(state_dict))

    def describe(self, checkpoint: Checkpoint) -> 'spandrel.ImageModelDescriptor':
        """As :meth:`load`, with the configuration that a checkpoint carries."""
        config = as_arch(described(checkpoint, self.id), self.id)
        if not self.pure_pass:
            config = dense_variant(config)
        with torch_defaults():
            net = build_and_load(lambda: build_network(config, dense=not self.pure_pass), checkpoint, config['type'])
        tags = [title_of(net), f'{config.get("embed_dim", "")}dim', 'pure-pass' if net.pure_pass else 'dense']
        return spandrel.ImageModelDescriptor(
            net,
            net.state_dict(),
            architecture=self,
            purpose='Restoration' if net.upscale == 1 else 'SR',
            tags=[tag for tag in tags if tag != 'dim'],
            supports_half=True,
            supports_bfloat16=True,
            scale=net.upscale,
            input_channels=3,
            output_channels=3,
            # any size: the network pads by itself, and tiles cost nothing in PSNR (docs/upscale.md)
            size_requirements=spandrel.SizeRequirements(),
            tiling=spandrel.ModelTiling.SUPPORTED,
        )


def _masked_archs() -> list[str]:
    """Our networks that exempt pixels."""
    return [name for name, cls in ARCH_REGISTRY if is_ours(name) and getattr(cls, 'dense_arch', None)]


def install(registry=None, *, pure_pass: bool = True) -> list[str]:
    """Put our networks into a registry of spandrel, in front of those that take the same weights.

    Args:
        registry: a spandrel.ArchRegistry; None: the one that every ModelLoader uses.
        pure_pass: False runs the weights with nothing exempted.

    Returns:
        The ids that were added; a second call adds none.
    """
    registry = spandrel.MAIN_REGISTRY if registry is None else registry
    supports = [
        spandrel.ArchSupport.from_architecture(PurePassArchitecture(arch, pure_pass), before=BEFORE)
        for arch in _masked_archs()
    ]
    return [str(added.architecture.id) for added in registry.add(*supports, ignore_duplicates=True)]


def load(
    path_or_name, *, pure_pass: bool = True, device: str | torch.device = 'cpu'
) -> 'spandrel.ImageModelDescriptor':
    """A weight file, or shipped weights by name, as spandrel's descriptor, with the settings that the file carries.

    Args:
        path_or_name: as in :func:`ppsr.load_model`. A file without a configuration runs with Pure-Pass.
        pure_pass: False runs the weights with nothing exempted.
        device: of the network.

    Raises:
        UserError: no such weights, or they are not those of a network of ours.
    """
    checkpoint = read_checkpoint(resolve(path_or_name))
    arch = described(checkpoint)['type']
    if checkpoint.config is None:
        arch = next((name for name in _masked_archs() if ARCH_REGISTRY.get(name).dense_arch == arch), arch)
    return PurePassArchitecture(arch, pure_pass).describe(checkpoint).to(resolve_device(device))
