"""Registration in basicsr's registries that survives being imported twice."""

__all__ = ['register', 'registered']


def register(registry):
    """Class decorator: register under the class name in a basicsr `registry` (or the one of a vendored basicsr).

    basicsr refuses a name that it already has. A reload of this package, or its import under a second basicsr, brings
    the same class again and replaces the entry; a class of another package under the same name is an error.

    Raises:
        KeyError: the name belongs to somebody else's class.
    """

    def decorate(cls):
        name = cls.__name__
        if name in registry:
            owner = registry.get(name).__module__
            if owner != cls.__module__:
                raise KeyError(
                    f'{name!r} is already registered by {owner}; ppsr cannot register its own under that name.'
                )
            del registry._obj_map[name]
        registry.register(cls)
        return cls

    return decorate


def registered(registry, name):
    """What basicsr's `registry` finds under a name, with its suffix for what basicsr brings itself, or None."""
    if not isinstance(name, str):
        return None
    return registry._obj_map.get(name) or registry._obj_map.get(f'{name}_basicsr')
