"""Packages that only some features need: asked for when the feature is used, with a sentence where they are missing."""

import importlib
from types import ModuleType

from ppsr.errors import UserError

__all__ = ['need']


def need(extra: str, feature: str, *names: str) -> list[ModuleType]:
    """Import what an extra of this package brings.

    Args:
        extra: its name in setup.py.
        feature: what needs it, for the message.
        *names: of the modules.

    Returns:
        The modules, in order.

    Raises:
        UserError: one of them is not installed or cannot be imported; says how to install them.
    """
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except ImportError as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == name.split('.')[0]
            why = 'is not installed' if absent else f'cannot be imported ({error})'
            raise UserError(
                f'{feature} needs the package {name.split(".")[0]}, which {why}; install it with '
                f"pip install 'ppsr[{extra}]'."
            ) from error
    return modules
