"""The one builder of networks: from options, from weight files, dense or masked.

A network is described by a mapping as in an options file: `type`, a name in basicsr's registry, and constructor
arguments. Networks of other packages are built in the same way.
"""

import inspect
import pickle
from collections.abc import Mapping

from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from ppsr.archs.masked import MaskedNetwork, as_masked
from ppsr.archs.settings import check_settings
from ppsr.errors import UserError
from ppsr.registry import registered
from ppsr.schema import nearest, show

__all__ = [
    'as_arch',
    'build_masked',
    'build_network',
    'check_network',
    'config_from',
    'dense_variant',
    'masked_variant',
    'derived_buffers',
    'network_arguments',
    'relatives',
    'title_of',
]


def network_arguments(cls: type) -> dict[str, inspect.Parameter]:
    """Options of a network by name: its constructor arguments, those that ``**kwargs`` hands on to its base classes
    included, without what is for Python only (:attr:`MaskedNetwork.not_options`)."""
    arguments = {}
    for base in cls.__mro__:
        if base is MaskedNetwork:
            break
        if '__init__' not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        for p in parameters:
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                arguments.setdefault(p.name, p)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    hidden = cls.not_options if issubclass(cls, MaskedNetwork) else ()
    return {name: p for name, p in arguments.items() if name not in hidden}


def check_network(network: Mapping, where: str = 'network_g') -> None:
    """Refuse a network type that is not registered, arguments that it does not take, and, of ours, their values.

    Raises:
        UserError: naming the key and what there is instead.
    """
    kind = network.get('type')
    cls = registered(ARCH_REGISTRY, kind)
    if cls is None:
        ours = [name for name, cls in ARCH_REGISTRY if cls.__module__.startswith('ppsr.')]
        raise UserError(f'{where}: type: {show(kind)} is not a registered arch; those of ppsr are {", ".join(ours)}.')
    arguments = network_arguments(cls)
    for key in network:
        if key != 'type' and key not in arguments:
            hint = nearest(key, arguments)
            raise UserError(f'{where}: {kind} takes no option {key!r}{hint}; it takes {", ".join(arguments)}.')
    if cls.__module__.startswith('ppsr.'):
        check_settings(network, where)


def build_network(network: Mapping, where: str = 'network_g', dense: bool = False) -> nn.Module:
    """A network, anybody's, in eval mode with random weights.

    Args:
        network: `type` and arguments.
        where: what an error names as the place of the mistake.
        dense: exempt nothing (:func:`dense_variant`).

    Raises:
        UserError: a type or an argument that does not exist, or a value that is not supported.
    """
    check_network(network, where)
    if dense:
        network = dense_variant(network)
    arguments = {name: value for name, value in network.items() if name != 'type'}
    try:
        net = registered(ARCH_REGISTRY, network['type'])(**arguments).eval()
    except (ValueError, TypeError, OSError, EOFError, pickle.UnpicklingError) as e:  # others open files, and more
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip('.')
        raise UserError(f'{where}: {network["type"]} cannot be built: {reason}.') from e
    contract = as_masked(net)
    if dense and contract is not None:
        contract.exempt_nothing()
    return net


def build_masked(network: Mapping, where: str = 'network_g') -> MaskedNetwork:
    """As :func:`build_network`, where multiply-adds are wanted: the network has to keep the contract.

    Raises:
        UserError: it does not, or it cannot be built.
    """
    net = as_masked(build_network(network, where))
    if net is None:
        raise UserError(
            f'{where}: {network["type"]} does not count its multiply-adds (it is no ppsr.archs.MaskedNetwork).'
        )
    return net


def as_arch(network: Mapping, arch: str | None, where: str = 'network_g') -> dict:
    """The description of a network changed to another arch with the same weights, which keeps of the ``pp_*`` options
    those that it takes; None changes nothing.

    Raises:
        UserError: the arch is not registered, or is one of ours that has other weights.
    """
    kin = relatives(network.get('type'))
    if arch is not None and kin and relatives(arch) and arch not in kin:
        raise UserError(f'{where}: weights of {network["type"]} do not run as {arch}, but as {" or ".join(kin)}.')
    network = dict(network) if arch is None else {**network, 'type': arch}
    check_network({'type': network.get('type')}, where)
    takes = network_arguments(registered(ARCH_REGISTRY, network['type']))
    return {name: value for name, value in network.items() if name in takes or not name.startswith('pp_')}


def relatives(arch: str | None) -> list[str]:
    """The networks of ours that have the same weights as one of them, itself included; of others none."""
    ours = {name: cls for name, cls in ARCH_REGISTRY if cls.__module__.startswith('ppsr.')}
    dense = {name: getattr(cls, 'dense_arch', None) or name for name, cls in ours.items()}
    return [name for name in ours if arch in ours and dense[name] == dense[arch]]


def dense_variant(network: Mapping) -> dict:
    """The description of the network with the same weights that exempts nothing, where there is such an arch; else the
    same."""
    cls = registered(ARCH_REGISTRY, network['type'])
    dense = cls.dense_arch if issubclass(cls, MaskedNetwork) else None
    return as_arch(network, dense)


def masked_variant(network: Mapping, where: str = 'network_g') -> dict:
    """The description of the network with the same weights that may exempt pixels, from window attention, too.

    Raises:
        UserError: there is none.
    """
    kind = network['type']
    for name, cls in ARCH_REGISTRY:
        ours = inspect.isclass(cls) and issubclass(cls, MaskedNetwork) and kind in (name, cls.dense_arch)
        if ours and 'window' in cls.scopes and 'pp_scope' in network_arguments(cls):
            return {**network, 'type': name}
    raise UserError(f'{where}: {kind} has no window attention that pure pixels could be exempt from.')


def config_from(state_dict: Mapping[str, Tensor], arch: str | None = None) -> dict:
    """The description of the network that weights are from, by their names and shapes.

    Args:
        arch: registered name to record; None: the arch that knows the weights for its own, of two with the same
            weights the one that exempts nothing, unless they hold what pure pixels get.

    Raises:
        UserError: no registered network knows them, or `arch` does not.
    """
    if arch is not None:
        check_network({'type': arch}, 'arch')
    found = {}
    for name, cls in ARCH_REGISTRY:
        if arch in (None, name) and inspect.isclass(cls) and issubclass(cls, MaskedNetwork):
            config = cls.config_from(state_dict)
            if config is not None:
                rank = 0 if any(key.startswith('pp_') for key in config) else 2 if cls.dense_arch else 1
                found.setdefault(rank, {'type': name, **config})
    if found:
        return found[min(found)]
    what = 'an ATD-light network or another of ppsr' if arch is None else arch
    raise UserError(f'these weights are not those of {what}; give the configuration of their network.')


def derived_buffers() -> frozenset[str]:
    """The :attr:`MaskedNetwork.derived_buffers` of all registered networks."""
    networks = (cls for _, cls in ARCH_REGISTRY if inspect.isclass(cls) and issubclass(cls, MaskedNetwork))
    return frozenset(name for cls in networks for name in cls.derived_buffers)


def title_of(net: nn.Module) -> str:
    """Name of a network in tables and captions."""
    contract = as_masked(net)
    return MaskedNetwork.title if contract is None else contract.title
