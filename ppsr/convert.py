"""From a weight file to another: a BasicSR .pth becomes a .safetensors that carries its configuration, and back."""

from collections.abc import Iterator
from pathlib import Path

from basicsr.utils.registry import ARCH_REGISTRY

from ppsr.archs.settings import check_settings
from ppsr.errors import UserError
from ppsr.weights import as_arch, build_and_load, described, read_checkpoint, save_checkpoint

__all__ = ['convert']

MAX_FACT = 1000  # characters of a fact that are printed


def convert(
    source: str | Path,
    target: str | Path,
    arch: str | None = None,
    category_size: int | None = None,
    key: str | None = None,
) -> Iterator[str]:
    """Convert a weight file, after the network has been built and has taken the weights.

    Args:
        source: .pth (BasicSR's, ours or a published ATD-light's) or .safetensors.
        target: .safetensors, or .pth (which cannot carry a configuration).
        arch: recorded type of the network; None = what the file says, else 'ATDLight'.
        category_size: recorded; a .pth does not say it, and nothing in its weights shows it. None = what the file
            says, else the published 128.
        key: 'params_ema' or 'params'; None = the first that is there.

    Yields:
        Lines about what was found and done.

    Raises:
        UserError: not weights of ATD-light, or they do not fit the configuration; nothing is written then.
    """
    checkpoint = read_checkpoint(source, key)
    if key and checkpoint.key != key:
        raise UserError(f'{source} has no {key!r} weights.')
    known = checkpoint.config is not None
    config = as_arch(described(checkpoint, arch), arch)
    if config['type'] not in ARCH_REGISTRY:
        raise UserError(f'{config["type"]!r} is not a registered arch; ours are ATDLight and PPATDLight.')
    if category_size is not None:
        config = check_settings(config | {'category_size': category_size}, f'{source}: its configuration')
    where = {'': 'at the top level', 'safetensors': 'as safetensors'}.get(checkpoint.key, f'under {checkpoint.key!r}')
    tensors = checkpoint.state_dict
    dtypes = ', '.join(sorted({str(t.dtype).removeprefix('torch.') for t in tensors.values()}))
    count = sum(t.numel() for t in tensors.values())
    yield f'{source}: {count:,} parameters in {len(tensors)} tensors {where}, {dtypes}'
    yield f'configuration ({"from the file" if known else "from the shapes of the parameters"}):'
    yield from (f'  {name}: {value}' for name, value in config.items())
    if not known and category_size is None:
        yield f'  (category_size {config["category_size"]} is the published one: the file does not say it)'
    yield from (f'  {printable(name)}: {printable(value)}' for name, value in checkpoint.facts.items())

    arguments = {name: value for name, value in config.items() if name != 'type'}
    try:
        net = build_and_load(lambda: ARCH_REGISTRY.get(config['type'])(**arguments), checkpoint, config['type'])
    except (TypeError, ValueError) as error:
        raise UserError(f'{source}: {config["type"]} cannot be built with this configuration: {error}') from None
    buffers = {name: value for name, value in net.state_dict().items() if name not in tensors}  # those that follow
    save_checkpoint(target, tensors | buffers, config, checkpoint.facts)
    yield f'{target} written: {config["type"]} ×{config.get("upscale", "?")}, all keys fit'


def printable(value) -> str:
    """A value from a file on one line of a terminal, without characters that would do something there."""
    text = ''.join(c if c.isprintable() else repr(c)[1:-1] for c in str(value)[:MAX_FACT])
    return text + '…' * (len(str(value)) > MAX_FACT)
