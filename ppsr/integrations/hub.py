"""``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` of our networks (huggingface_hub, docs/integrations.md).

A folder or repository holds ``model.safetensors``, a weight file of ours with the configuration in its metadata; beside
it ``config.json`` says the same to people and to the hub. What is read is held against the schema of our settings like
any weight file: it cannot name code.
"""

import inspect
import json
import os
import re
from pathlib import Path

import torch
from torch import nn

from ppsr.atomic import atomic_path
from ppsr.errors import UserError
from ppsr.extras import need

try:
    from huggingface_hub import PyTorchModelHubMixin as _Mixin
except ImportError:  # the folder half works without it

    class _Mixin:
        """Stands in where huggingface_hub is not installed."""

        _hub_mixin_config: dict | None = None

        def __init_subclass__(cls, **about):
            super().__init_subclass__()

        def save_pretrained(self, save_directory, **kwargs):
            need('hub', 'save_pretrained', 'huggingface_hub')

        def push_to_hub(self, repo_id, **kwargs):
            need('hub', 'push_to_hub', 'huggingface_hub')


__all__ = ['HubNetwork']

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
REPOSITORY = re.compile(r'[\w.-]+/[\w.-]+')
CARD = """---
{{ card_data }}
---

Image super-resolution with ppsr, [Pure-Pass](https://arxiv.org/abs/2510.01997) for BasicSR:

```python
import ppsr
from ppsr.archs import {{ network }}

net = {{ network }}.from_pretrained('this repository')
image = ppsr.Upscaler(net)('photo.jpg')
```
"""


class HubNetwork(
    _Mixin,
    library_name='ppsr',
    tags=['super-resolution', 'pure-pass'],
    pipeline_tag='image-to-image',
    paper_url='https://arxiv.org/abs/2510.01997',
    model_card_template=CARD,
):
    """Base that gives a network the hub's three methods."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        device: str | torch.device = 'cpu',
        **settings,
    ) -> nn.Module:
        """A network with weights from a folder, a weight file, the shipped ones, or a repository of the hub.

        Args:
            pretrained_model_name_or_path: a folder that :meth:`save_pretrained` has written, a weight file, a name of
                :func:`ppsr.weights.list_pretrained`, or a repository ('owner/name').
            revision, cache_dir, force_download, local_files_only, token: of a repository, as for huggingface_hub.
            device: of the network.
            **settings: of the network, in place of the file's (`pp_num_centers=16`).

        Returns:
            A network of this class in eval mode; of :class:`~ppsr.archs.MaskedNetwork` itself, the one that the file
            names.

        Raises:
            UserError: nothing there, weights that do not fit, or settings that are refused.
        """
        from ppsr.weights import load_model

        download = dict(
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        path = _find(str(pretrained_model_name_or_path), download)
        return load_model(path, arch=cls._arch(), device=device, settings=settings)

    @classmethod
    def _arch(cls) -> str | None:
        """Registered name of the class, None for the base of all."""
        from basicsr.utils.registry import ARCH_REGISTRY

        if inspect.isabstract(cls):
            return None
        if cls.__name__ not in ARCH_REGISTRY:
            raise UserError(f"{cls.__name__}.from_pretrained: register the class in basicsr's ARCH_REGISTRY first.")
        return cls.__name__

    @property
    def configuration(self) -> dict:
        """What ``network_g`` says of this network in an options file: `type` and all arguments of the constructor."""
        from ppsr.archs.build import dense_variant, network_arguments

        given = self._hub_mixin_config or {}
        arguments = network_arguments(type(self))
        config = {'type': type(self).__name__} | {name: given.get(name, p.default) for name, p in arguments.items()}
        config = dense_variant(config) if self.pure_pass is None else config
        return json.loads(json.dumps(config))  # lists, as a file gives them

    def _save_pretrained(self, save_directory: Path) -> None:
        from ppsr.weights import save_checkpoint

        config = self.configuration
        save_checkpoint(save_directory / WEIGHTS, self.state_dict(), config)
        try:
            with atomic_path(save_directory / CONFIG) as temporary:
                temporary.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
        except OSError as e:
            raise UserError(f'{save_directory / CONFIG}: cannot be written ({e.strerror or e}).') from e

    def generate_model_card(self, *args, **kwargs):
        return super().generate_model_card(*args, network=type(self).__name__, **kwargs)


def _find(name: str, download: dict) -> Path:
    """The weight file that a name means."""
    from ppsr.weights import list_pretrained, resolve

    if name in list_pretrained() or os.path.isfile(name):
        return resolve(name)
    if os.path.isdir(name):
        path = Path(name) / WEIGHTS
        if not path.is_file():
            raise UserError(f'{name}: a folder without {WEIGHTS}; give one that save_pretrained has written.')
        return path
    if not REPOSITORY.fullmatch(name):
        raise UserError(
            f'{name}: no folder, no weight file, no name of shipped weights ({", ".join(list_pretrained())}), and no '
            'name of a repository (owner/name).'
        )
    (hub,) = need('hub', f'from_pretrained({name!r}), which is no folder here,', 'huggingface_hub')
    try:
        return Path(hub.hf_hub_download(name, WEIGHTS, **download))
    except Exception as e:  # the hub's own errors, and those of whatever it speaks HTTP with
        line = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip('.')
        raise UserError(f'{name}: no such folder here, and the hub does not give its {WEIGHTS} ({line}).') from e
