"""What has to be mended so that basicsr 1.4.2 (the newest on PyPI) imports on today's torch, torchvision and Python,
and so that no file that it reads runs code.

Imported before anything of basicsr. Every work-around is applied only where its breakage is really there, says why it
exists and when it can go, and is listed by ``ppsr doctor`` (:func:`report`). Nothing else is changed in basicsr: what
it does wrong at run time is done right in our own subclasses (``ppsr/models``, ``ppsr/training``), not patched. torch
and torchvision themselves are left as they are: other programs in the process see nothing of this.
"""

import functools
import importlib
import importlib.util
import re
import sys
import types
from typing import NamedTuple

import torch
import torchvision
from torchvision.models import vgg
from torchvision.transforms.functional import rgb_to_grayscale

__all__ = ['WorkAround', 'apply', 'report']


class WorkAround(NamedTuple):
    """One known breakage: what it is, whether it is present here, and whether it is worked around."""

    name: str
    present: bool
    worked_around: bool
    why: str
    until: str


_report: list[WorkAround] = []


def _missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except (ImportError, ValueError):
        return True


def _functional_tensor() -> WorkAround:
    """``basicsr.data.degradations`` imports a torchvision module that is gone since torchvision 0.17."""
    name = 'torchvision.transforms.functional_tensor'
    present = name not in sys.modules and _missing(name)
    if present:
        stand_in = types.ModuleType(name, 'Stand-in made by ppsr.compat for basicsr 1.4.2.')
        stand_in.rgb_to_grayscale = rgb_to_grayscale
        sys.modules[name] = stand_in
    made_by_us = (getattr(sys.modules.get(name), '__doc__', '') or '').startswith('Stand-in made by ppsr')
    return WorkAround(
        name,
        present or made_by_us,
        present or made_by_us,
        'basicsr imports rgb_to_grayscale from it; the module is gone since torchvision 0.17',
        'basicsr imports rgb_to_grayscale from torchvision.transforms.functional',
    )


def _distutils() -> WorkAround:
    """``basicsr.archs.arch_util`` compares versions with distutils, gone in Python 3.12 unless setuptools is there."""
    present = 'distutils.version' not in sys.modules and _missing('distutils')
    if present:

        class LooseVersion:
            """The one thing basicsr asks of it: ``LooseVersion(a) >= LooseVersion(b)`` on release numbers."""

            def __init__(self, version: str):
                self.version = [int(part) for part in re.findall(r'\d+', version.split('+')[0])]

            def __ge__(self, other: 'LooseVersion') -> bool:
                return self.version >= other.version

        package = types.ModuleType('distutils', 'Stand-in made by ppsr.compat for basicsr 1.4.2.')
        module = types.ModuleType('distutils.version', 'Stand-in made by ppsr.compat for basicsr 1.4.2.')
        module.LooseVersion = LooseVersion
        package.version = module
        sys.modules['distutils'] = package
        sys.modules['distutils.version'] = module
    return WorkAround(
        'distutils.version.LooseVersion',
        present,
        present,
        'basicsr.archs.arch_util imports it; distutils is gone in Python 3.12 unless setuptools is installed',
        'basicsr compares versions with packaging.version',
    )


# every module of basicsr that calls torch.load when it is imported, or builds a network or a model
_LOADING = (
    'models.base_model',
    'archs.basicvsr_arch',
    'archs.dfdnet_arch',
    'archs.inception',
    'archs.spynet_arch',
    'archs.tof_arch',
    'archs.vgg_arch',
)


class _StandIn(types.ModuleType):
    """A module as seen from basicsr: some names are replaced, all others are those of the module itself."""

    def __init__(self, module: types.ModuleType, **replaced):
        super().__init__(module.__name__, 'Stand-in made by ppsr.compat for basicsr 1.4.2.')
        self.__dict__.update(replaced, _module=module)

    def __getattr__(self, name: str):
        return getattr(self._module, name)


def _unpickling() -> WorkAround:
    """basicsr reads weights with ``torch.load(path)``. What that executes is for torch's version and for an environment
    variable to decide (everything before 2.6); here it is ``weights_only=True`` always."""
    torch_for_basicsr = _StandIn(torch, load=functools.partial(torch.load, weights_only=True))
    for name in _LOADING:
        module = importlib.import_module(f'basicsr.{name}')
        if isinstance(module.torch, types.ModuleType) and not isinstance(module.torch, _StandIn):
            module.torch = torch_for_basicsr
    inception = importlib.import_module('basicsr.archs.inception')
    inception.load_url = functools.partial(torch.hub.load_state_dict_from_url, weights_only=True)
    vgg_arch = importlib.import_module('basicsr.archs.vgg_arch')
    builders = {name: functools.partial(_vgg, name) for name in vgg.__all__ if name.startswith('vgg')}
    vgg_arch.vgg = _StandIn(vgg, **builders)
    return WorkAround(
        'torch.load without weights_only',
        True,
        True,
        'basicsr leaves it to torch whether a weight file may run code: before 2.6 it may',
        'basicsr passes weights_only=True',
    )


def _vgg(name: str, pretrained: bool = False):
    """``torchvision.models.<name>(pretrained=…)``, with its published weights read as weights only."""
    net = getattr(torchvision.models, name)(weights=None, **({'init_weights': False} if pretrained else {}))
    if pretrained:
        url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
        weights = torch.hub.load_state_dict_from_url(url, map_location='cpu', check_hash=True, weights_only=True)
        net.load_state_dict(weights)
    return net


def apply() -> None:
    """Make ``import basicsr`` work, and its loading safe. Safe to call any number of times; the first call decides."""
    if not _report:
        _report.extend([_functional_tensor(), _distutils()])  # now it can be imported
        _report.append(_unpickling())


def report() -> list[WorkAround]:
    """The known breakages of basicsr 1.4.2, as found and handled in this process."""
    apply()
    return list(_report)
