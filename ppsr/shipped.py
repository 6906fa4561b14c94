"""Where the weights and options files that come with the package lie: in a clone, and in an installed wheel."""

import os
from pathlib import Path

__all__ = ['options_file', 'pretrained_models']

PACKAGE = Path(__file__).resolve().parent
CLONE = PACKAGE.parent  # setup.py puts what lies there into the wheel, under the names below


def _folder(in_wheel: str, in_clone: str) -> Path:
    installed = PACKAGE / in_wheel
    return installed if installed.is_dir() else CLONE / in_clone


def pretrained_models() -> Path:
    """Folder of the shipped weights."""
    return _folder('pretrained_models', 'experiments/pretrained_models')


def options_file(path: str) -> str:
    """An options file as it is given; ``options/…`` that is not in the working folder is the shipped one.

    So the commands of the documentation work in any folder, from a wheel as in a clone.
    """
    first, *rest = Path(path).parts or ('',)
    shipped = _folder('options', 'options').joinpath(*rest)
    if first == 'options' and '..' not in rest and not os.path.exists(path) and os.path.isfile(shipped):
        return str(shipped)
    return path
