"""From a weight file to another: a BasicSR .pth becomes a .safetensors that carries its configuration, and back."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ppsr.archs.build import as_arch, build_network
from ppsr.archs.settings import check_settings
from ppsr.calibration.curve import KEY, Curve
from ppsr.errors import UserError
from ppsr.weights import build_and_load, described, read_checkpoint, save_checkpoint

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
        source: .pth (BasicSR's, ours or a published ATD-light's, of either version) or .safetensors.
        target: .safetensors, or .pth (which cannot carry a configuration).
        arch: recorded type of the network; None = what the file says, else what its weights look like.
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
    config = as_arch(described(checkpoint, arch), arch, f'{source}')
    if category_size is not None:
        config = check_settings(config | {'category_size': category_size}, f'{source}: its configuration')
    where = {'': 'at the top level', 'safetensors': 'as safetensors'}.get(checkpoint.key, f'under {checkpoint.key!r}')
    tensors = checkpoint.state_dict
    dtypes = ', '.join(sorted({str(t.dtype).removeprefix('torch.') for t in tensors.values()}))
    count = sum(t.numel() for t in tensors.values())
    yield f'{source}: {count:,} parameters in {len(tensors)} tensors {where}, {dtypes}'
    yield f'configuration ({"from the file" if known else "from the shapes of the parameters"}):'
    yield from (f'  {name}: {value}' for name, value in config.items())
    if not known and category_size is None and 'category_size' in config:
        yield f'  (category_size {config["category_size"]} is the published one: the file does not say it)'
    yield from (f'  {printable(name)}: {printable(_shown(name, value))}' for name, value in checkpoint.facts.items())

    net = build_and_load(lambda: build_network(config, f'{source}'), checkpoint, config['type'])
    buffers = {name: value for name, value in net.state_dict().items() if name not in tensors}  # those that follow
    save_checkpoint(target, tensors | buffers, config, checkpoint.facts)
    yield f'{target} written: {config["type"]} ×{config.get("upscale", "?")}, all keys fit'


def _shown(name: str, fact):
    """A fact, of a curve what it was measured on instead of its hundreds of numbers."""
    if name == KEY:
        with suppress(UserError):
            curve = Curve.from_fact(fact, name)
            return f'{len(curve.points)} settings on {curve.images} images of {curve.data}, against {curve.against}'
    return fact


def printable(value) -> str:
    """A value from a file on one line of a terminal, without characters that would do something there."""
    text = ''.join(c if c.isprintable() else repr(c)[1:-1] for c in str(value)[:MAX_FACT])
    return text + '…' * (len(str(value)) > MAX_FACT)
