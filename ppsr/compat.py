"""What has to be mended so that basicsr 1.4.2 (the newest on PyPI) imports on today's torch, torchvision and Python.

Imported before anything of basicsr. Every work-around is applied only where its breakage is really there, says why it
exists and when it can go, and is listed by ``ppsr doctor`` (:func:`report`). Nothing else is changed in basicsr: what
it does wrong at run time is done right in our own subclasses (``ppsr/models``, ``ppsr/train.py``), not patched.
"""

import importlib.util
import re
import sys
import types
from typing import NamedTuple

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
        from torchvision.transforms.functional import rgb_to_grayscale

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


def apply() -> None:
    """Make ``import basicsr`` work. Safe to call any number of times; the first call decides."""
    if not _report:
        _report.extend([_functional_tensor(), _distutils()])


def report() -> list[WorkAround]:
    """The known import breakages of basicsr 1.4.2, as found and handled in this process."""
    apply()
    return list(_report)
