"""Reading, writing and naming weights: kept apart from the networks.

Weight files of ours are safetensors whose metadata carries the configuration (what ``network_g`` says in an options
file) and the facts of a model card. Any BasicSR ``.pth`` is read, too, with ``weights_only=True``: a pickle that would
run code is refused.
"""

import contextlib
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ppsr.archs.build import as_arch, build_network, config_from, dense_variant, derived_buffers, relatives
from ppsr.archs.masked import as_masked
from ppsr.archs.settings import MASK_SETTINGS, SETTINGS, check_settings
from ppsr.atomic import atomic_path
from ppsr.device import torch_defaults
from ppsr.errors import UserError
from ppsr.schema import show
from ppsr.shipped import pretrained_models

__all__ = [
    'Checkpoint',
    'build_and_load',
    'compare',
    'default_model',
    'described',
    'guess_config',
    'list_pretrained',
    'load_into',
    'load_model',
    'read_checkpoint',
    'require_fit',
    'require_shapes',
    'require_writable',
    'resolve',
    'save_checkpoint',
    'without_derived',
]

MAX_NAME = 100  # characters of a parameter's name in a message
DEFAULT_MODEL = 'PPATDLight_x4'
OTHER_KEYS = ('state_dict', 'model_state_dict', 'model', 'net')  # where other projects' files have their parameters
FAMILY = re.compile(r'PPATDLight_x(\d+)')  # the shipped weights of each scale


@dataclass
class Checkpoint:
    """What a weight file holds.

    Attributes:
        state_dict: parameter name -> tensor, on the CPU, without 'module.' prefixes and without what follows from the
            configuration (:func:`ppsr.archs.build.derived_buffers`).
        config: ``type`` and constructor arguments of the network, or None where the file does not say.
        facts: model card (strings, numbers), may be empty.
        key: under which key the parameters were: 'params_ema', 'params', or '' for a bare state dict.
        path: the file.
    """

    state_dict: dict[str, Tensor]
    config: dict | None = None
    facts: dict = field(default_factory=dict)
    key: str = ''
    path: Path | None = None

    @property
    def scale(self) -> int | None:
        """Upscaling factor that the last convolution was made for, or None if there is none that we know."""
        last = self.state_dict.get('upsample.0.weight')
        return None if last is None else round((last.shape[0] / 3) ** 0.5)


def read_checkpoint(path: str | Path, key: str | None = None) -> Checkpoint:
    """Read a weight file; nothing in it is executed.

    Args:
        path: .safetensors, or a torch file (.pth, .pt) as BasicSR writes it.
        key: 'params_ema' or 'params' to prefer one; without it, or where that one is not there, the first found of
            params_ema, params, what other projects call it (state_dict, model, …), and the bare state dict is taken.

    Raises:
        UserError: no such file, not a weight file, or one that contains more than weights.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such weight file.')
    if path.suffix == '.safetensors':
        return _read_safetensors(path)
    if zipfile.is_zipfile(path):
        _check_archive(path)
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        if 'GLOBAL' in str(e):  # the pickle names a function or a class that is not on torch's list of harmless ones
            raise UserError(
                f'{path}: refused, because it holds more than weights (a pickle that would run code on loading); '
                'ask its author for a .safetensors or a plain state dict.'
            ) from e
        raise UserError(f'{path}: not a weight file that torch can read safely.') from e
    except Exception as e:  # damaged bytes make torch raise nearly anything
        raise UserError(f'{path}: not a weight file that torch can read ({_first_line(e)}).') from e
    return _from_content(path, content, key)


def _check_archive(path: Path) -> None:
    """Refuse a zip file that would unpack into more than it holds: torch stores, it does not compress."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        size = path.stat().st_size
    except Exception as e:  # damaged bytes again
        raise UserError(f'{path}: not a weight file that torch can read ({_first_line(e)}).') from e
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise UserError(f'{path}: refused, because it claims to hold more than its {size:,} bytes.')


def _from_content(path: Path, content, key: str | None) -> Checkpoint:
    if not isinstance(content, dict):
        raise UserError(f'{path}: holds a {type(content).__name__}, not a dictionary of parameters.')
    for name in (key, 'params_ema', 'params', *OTHER_KEYS):
        if name and isinstance(content.get(name), dict):
            state, used = content[name], name
            break
    else:
        state, used = content, ''
    strange = [name for name, value in state.items() if not isinstance(value, Tensor) or not isinstance(name, str)]
    if strange or not state:
        found = ', '.join(map(show, strange[:5])) or 'nothing'
        raise UserError(f'{path}: no parameters under params_ema, params or at the top level (found: {found}).')
    _check_tensors(path, state)
    return Checkpoint(without_derived(state), key=used, path=path)


def _check_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Refuse tensors that are no plain numbers in the file, and such that claim to be larger than what is stored."""
    stored, claimed = {}, 0
    for name, value in state.items():
        if value.layout != torch.strided or value.device.type != 'cpu' or value.is_quantized:
            kind = 'quantized' if value.is_quantized else 'without data' if value.is_meta else f'{value.layout}'
            raise UserError(
                f'{path}: {show(name)} is {kind.removeprefix("torch.")}; convert it to plain numbers first.'
            )
        size, storage = value.numel() * value.element_size(), value.untyped_storage()
        if size > storage.nbytes():
            raise UserError(
                f'{path}: {show(name)} claims to be {tuple(value.shape)}, more than the {storage.nbytes():,} bytes '
                'that are there for it.'
            )
        stored[storage.data_ptr()] = storage.nbytes()
        claimed += size
    if claimed > 2 * sum(stored.values()):  # a few tied weights are in order
        raise UserError(f'{path}: its tensors claim to be more than the {sum(stored.values()):,} bytes that are there.')


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safetensors.safe_open(path, framework='pt', device='cpu') as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        config, facts = json.loads(metadata.get('config', 'null')), json.loads(metadata.get('facts', '{}'))
    except Exception as e:  # damaged or hostile: too deep, a type of numbers that torch lacks, no JSON, …
        raise UserError(f'{path}: not a readable safetensors file ({_first_line(e)}).') from e
    if config is not None and not (isinstance(config, dict) and isinstance(config.get('type'), str)):
        raise UserError(f"{path}: its metadata 'config' is not a network configuration with a 'type'.")
    if not state:
        raise UserError(f'{path}: holds no parameters.')
    return Checkpoint(without_derived(state), config, facts if isinstance(facts, dict) else {}, 'safetensors', path)


def without_derived(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, without the prefix of DataParallel and without what follows from the configuration."""
    state = {name.removeprefix('module.'): value for name, value in state.items()}
    derived = derived_buffers()
    return {name: value for name, value in state.items() if name.rpartition('.')[2] not in derived}


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200].rstrip('.')


def save_checkpoint(path: str | Path, state_dict: dict[str, Tensor], config: dict | None = None, facts=None) -> None:
    """Write weights, whole or not at all: .safetensors with configuration and facts, or .pth as {'params_ema': …}.

    Raises:
        UserError: another suffix, or the disk refuses.
    """
    path = Path(path)
    state = {name.removeprefix('module.'): value.detach().cpu().contiguous() for name, value in state_dict.items()}
    if path.suffix not in ('.safetensors', '.pth'):
        raise UserError(f'{path}: weights are written as .safetensors or .pth, not {path.suffix or "without suffix"}.')
    # to memory first: what a full disk then interrupts is a plain write, with an error that says so
    if path.suffix == '.pth':
        buffer = io.BytesIO()
        torch.save({'params_ema': state}, buffer)
        content = buffer.getbuffer()
    else:
        metadata = {'format': 'pt', 'facts': json.dumps(facts or {})}
        if config is not None:
            metadata['config'] = json.dumps(config)
        content = safetensors.torch.save(state, metadata)
    with _written(path) as temporary:
        temporary.write_bytes(content)


def require_writable(path: str | Path) -> None:
    """Find out before a long computation whether :func:`save_checkpoint` will be able to write there.

    Raises:
        UserError: it will not.
    """
    with contextlib.suppress(_OnlyTried), _written(Path(path)):
        raise _OnlyTried  # the temporary file is removed, and `path` left as it is


class _OnlyTried(Exception):
    pass


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A file that is whole or not there, in a folder that is made; what the file system refuses is a UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            yield temporary
    except OSError as e:
        raise UserError(f'{path}: cannot be written ({e.strerror or e}).') from e


def load_into(net: nn.Module, checkpoint: Checkpoint, strict: bool = True) -> list[str]:
    """Load parameters into a network.

    Args:
        strict: False leaves out what does not fit (a ×2 upsampler for a ×4 network, when fine-tuning).

    Returns:
        One line for each key that was left out; empty when strict.

    Raises:
        UserError: strict, and keys are missing, unexpected or of another shape; the keys are named.
    """
    left_out = [] if strict else compare(net, checkpoint)[1]
    if strict:
        require_fit(net, checkpoint)
    own, given = net.state_dict(), checkpoint.state_dict
    fitting = {name: value for name, value in given.items() if name in own and not _differs(value, own[name])}
    net.load_state_dict(fitting, strict=False)
    return left_out


def require_fit(net: nn.Module, checkpoint: Checkpoint) -> None:
    """Refuse weights that are not those of a network, whose tensors may be without data (meta).

    Raises:
        UserError: keys are missing, unexpected, or of another shape or kind of number; the keys are named.
    """
    problems = compare(net, checkpoint)[0]
    if problems:
        missing = without_derived(net.state_dict()).keys() - checkpoint.state_dict.keys()
        if len(problems) == 1 and missing and all('.comp.' in name for name in missing):
            raise UserError(
                f'{checkpoint.path}: has no stand-in for window attention, which pp_scope exempts; fit one to it with '
                'ppsr calibrate, take a file that has one, or set pp_window_compensation: value.'
            )
        reason = _other_network(net, checkpoint) or f'does not fit {type(net).__name__}: {_some(problems, "; ")}'
        raise UserError(f'{checkpoint.path}: {reason}.')


def _other_network(net: nn.Module, checkpoint: Checkpoint) -> str | None:
    """Which network of ours weights are from that are not this one's, and what to set for them; None if it is none of
    ours, or nothing but this one, damaged."""
    contract = as_masked(net)
    if contract is None:
        return None
    own_type = type(contract).__name__
    try:
        found = guess_config(checkpoint.state_dict)
    except UserError:
        found = {'type': own_type, 'upscale': checkpoint.scale or contract.upscale}
    kin = relatives(found['type'])
    if own_type not in kin:
        masked = contract.dense_arch is not None
        wanted = next((k for k in kin if (ARCH_REGISTRY.get(k).dense_arch is not None) == masked), found['type'])
        return f'weights of {found["type"]}, but the network is {own_type}; set type: {wanted}, or name other weights'
    own = type(contract).config_from(contract.state_dict()) or {}
    other = {k: v for k, v in found.items() if not k.startswith('pp_') and k != 'type' and own.get(k, v) != v}
    if other.keys() == {'upscale'} or (not own and found['upscale'] != contract.upscale):
        return (
            f'weights for ×{found["upscale"]}, but the network is ×{contract.upscale}; name a checkpoint of that scale '
            '(or set strict_load_g: false to fine-tune from it)'
        )
    if not other:
        return None
    differences = ', '.join(f'{name}: {show(value)} (not {show(own[name])})' for name, value in other.items())
    return f'weights of a {own_type} of other sizes; set {differences}, or name other weights'


def compare(net: nn.Module, checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """What keeps weights from fitting a network: in short, and key by key. Its tensors may be without data (meta)."""
    own, given = without_derived(net.state_dict()), checkpoint.state_dict
    different = [
        f'{_name(name)} is {_kind(given[name], tensor)} in the file and {_kind(tensor, given[name])} in the network'
        for name, tensor in own.items()
        if name in given and _differs(given[name], tensor)
    ]
    missing = [_name(name) for name in own if name not in given]
    contract = as_masked(net)
    known = own.keys() | (contract.does_without() if contract is not None else set())
    unexpected = [_name(name) for name in given if name not in known]
    short = different[:]
    short += [f'{len(missing)} missing: {_some(missing)}'] if missing else []
    short += [f'{len(unexpected)} unexpected: {_some(unexpected)}'] if unexpected else []
    every = [f'{name} is not in the file' for name in missing] + [f'{n} is not in the network' for n in unexpected]
    return short, different + every


def _differs(given: Tensor, own: Tensor) -> bool:
    real = given.is_floating_point() == own.is_floating_point() and given.is_complex() == own.is_complex()
    return given.shape != own.shape or not real or (given.dtype == torch.bool) != (own.dtype == torch.bool)


def _kind(tensor: Tensor, other: Tensor) -> str:
    """What tells it from the other: its shape, or its type."""
    return str(tuple(tensor.shape) if tensor.shape != other.shape else tensor.dtype)


def _name(name: str) -> str:
    """A name for a message: other people's may be long, or move the cursor of a terminal."""
    return name if name.isprintable() and len(name) <= MAX_NAME else show(name)


def _some(names: list[str], separator: str = ', ') -> str:
    return separator.join(names[:4]) + (f'{separator}… ({len(names) - 4} more)' if len(names) > 4 else '')


def guess_config(state_dict: dict[str, Tensor], arch: str | None = None) -> dict:
    """Configuration of a checkpoint that does not carry one, from the names and shapes of its parameters
    (:func:`ppsr.archs.build.config_from`).

    What leaves no trace in the parameters is taken as published: category_size, the settings of the mask.

    Raises:
        UserError: these are not parameters of a network of this package.
    """
    return config_from(state_dict, arch)


def described(checkpoint: Checkpoint, arch: str | None = None) -> dict:
    """The configuration that a weight file gives, checked before anything is built from it.

    A file is somebody else's: it may name networks of this package alone, and give them settings within their ranges
    (:mod:`ppsr.archs.settings`); another arch, and what its constructor may open or fetch, is the user's to name.

    Args:
        arch: of the user, in place of the file's.

    Raises:
        UserError: the file names another network, or settings that none of ours takes or that are out of range; or its
            weights are not those of a network that we know.
    """
    config, state, where = checkpoint.config, checkpoint.state_dict, f'{checkpoint.path}: its configuration'
    if config is None:
        config = guess_config(state)
    ours = [name for name, _ in ARCH_REGISTRY if is_ours(name)]
    if arch is None and config['type'] not in ours:
        raise UserError(
            f'{where} names the network {show(config["type"])}; a weight file may name {", ".join(ours)}, another '
            'network has to be named by you (arch).'
        )
    strange = next((key for key in config if key != 'type' and key not in SETTINGS), None)
    if strange is not None:
        raise UserError(f'{where} has {show(strange)}, which is no setting of a network of ppsr.')
    mask = config.get('pp_mask')
    own = mask if isinstance(mask, dict) else {}
    strange = next((key for key in own if key != 'type' and key not in MASK_SETTINGS), None)
    if strange is not None:
        raise UserError(f'{where} → pp_mask has {show(strange)}, which is no setting of a mask of ppsr.')
    config = check_settings(config, where)
    if sum(config.get('depths', ())) > len(state):
        raise UserError(f'{where} asks for {sum(config["depths"])} layers, but there are {len(state)} tensors in all.')
    return config


def is_ours(arch: str) -> bool:
    """Whether a registered network is one of this package."""
    return arch in ARCH_REGISTRY and ARCH_REGISTRY.get(arch).__module__.startswith('ppsr.')


class _ShapesOnly(TorchFunctionMode):
    """Nothing is initialised: what is built holds shapes, and no memory (with torch.device('meta'))."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, '__name__', '')
        if name.endswith('_') and not name.endswith('__') and args and isinstance(args[0], Tensor):
            return args[0]
        return func(*args, **kwargs or {})


def require_shapes(build: Callable[[], nn.Module], checkpoint: Checkpoint) -> None:
    """As :func:`require_fit`, for a network of ours that is not built yet; takes no memory."""
    with torch.device('meta'), _ShapesOnly():
        require_fit(build(), checkpoint)


def build_and_load(build: Callable[[], nn.Module], checkpoint: Checkpoint, arch: str) -> nn.Module:
    """Build the network of a checkpoint and load it. One of ours is compared before memory is taken for it.

    Raises:
        UserError: the parameters do not fit.
    """
    if is_ours(arch):  # anybody's constructor may do what needs data
        require_shapes(build, checkpoint)
    net = build()
    load_into(net, checkpoint)
    return net


def list_pretrained() -> dict[str, Path]:
    """Names of the shipped weights and where they lie."""
    return {path.stem: path for path in sorted(pretrained_models().glob('*.safetensors'))}


def default_model(outscale: float | None = None) -> str:
    """Name of the shipped weights to enlarge by this factor: those of the next larger scale that there is, so that the
    result is never blown up behind the network where it can be helped; None takes ×4.

    >>> default_model()
    'PPATDLight_x4'
    """
    scales = {int(match[1]): name for name in list_pretrained() if (match := FAMILY.fullmatch(name))}
    if outscale is None or not scales:
        return DEFAULT_MODEL
    return scales[min((scale for scale in scales if scale >= outscale), default=max(scales))]


def resolve(path_or_name: str | Path | None = None) -> Path:
    """Path of a weight file, given by path or by the name of shipped weights; None is the default of these.

    What has neither a separator nor an ending is a name: shipped weights cannot be replaced by a file of that name in
    the working folder (``./NAME`` means the file).

    Raises:
        UserError: neither a file nor a name that is shipped.
    """
    name, shipped = str(DEFAULT_MODEL if path_or_name is None else path_or_name), list_pretrained()
    if name in shipped:
        return shipped[name]
    if os.path.isfile(name):
        return Path(name)
    there = f'the shipped weights are called {", ".join(shipped)}' if shipped else 'none are shipped'
    raise UserError(f'{name}: no such weight file, and {there}.')


def load_model(
    path_or_name: str | Path | None = None,
    arch: str | None = None,
    pure_pass: bool = True,
    device: str | torch.device = 'cpu',
    dtype: torch.dtype = torch.float32,
    settings: Mapping | None = None,
) -> nn.Module:
    """Build a network from a weight file and load it, in eval mode.

    Args:
        path_or_name: weight file, or the name of shipped weights; None takes the default ones.
        arch: build this registered arch instead of the one that the file names (PPATDLight runs a plain ATD
            checkpoint with Pure-Pass).
        pure_pass: False runs the weights dense, with nothing exempted.
        device, dtype: of the network returned.
        settings: constructor arguments in place of those in the file: {'pp_scope': ['category', 'window']}.

    Raises:
        UserError: no such file or name, settings that the network does not take, weights that do not fit, an arch that
            does not exist.
    """
    checkpoint = read_checkpoint(resolve(path_or_name))
    where = f'{checkpoint.path}: its configuration'
    config = as_arch(described(checkpoint, arch), arch, where) | dict(settings or {})
    if not pure_pass:
        config = dense_variant(config)
    with torch_defaults():  # bfloat16 as default would round the weights
        net = build_and_load(lambda: build_network(config, where, dense=not pure_pass), checkpoint, config['type'])
    return net.to(device=device, dtype=dtype).eval()
