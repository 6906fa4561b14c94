"""docs/options.md, written from the schema: ``python -m ppsr.training.document`` in the repository."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from basicsr.utils.registry import ARCH_REGISTRY

import ppsr  # noqa: F401, registers
from ppsr.archs.settings import SETTINGS
from ppsr.atomic import atomic_path
from ppsr.paper.study import Data, Study
from ppsr.schema import Kind, Section, Typed
from ppsr.training import schema
from ppsr.training.options import network_arguments

__all__ = ['document']

PATH = Path('docs/options.md')
INTRO = """\
# Options

Every key of an options file, what it may be and what it is when left out. Written by `python -m ppsr.training.document`
from the declarations in `ppsr/training/schema.py`, by which options files are checked: a key that is not here is
refused, with the nearest one suggested, and so is a value of another type or out of its range. A key may stand once.

`~` is YAML's nothing. Numbers with an exponent want a point (`1.0e-4`): YAML reads `1e-4` as text.
`--force_yml section:key=value` changes a value on the command line (`'val=~'` with quotes, as bash takes the `~` behind
a plain name for your home folder). Models of other packages have keys of their own
under `train`, `path`, `val`, `logger` and at the top, which are handed on unchecked. Of networks, losses and metrics of
other packages the names of the settings are checked, of their data sets what the training itself reads.
"""


def document() -> str:
    """docs/options.md: a table for every section."""
    return '\n'.join([INTRO, *_tables()]).rstrip() + '\n'


def _tables() -> Iterator[str]:
    yield _table('Top level', schema.Options)
    yield from _typed('datasets → train', schema.dataset_kind(train=True, ours=True))
    yield from _typed('datasets → val, val_2, test, test_1, …', schema.dataset_kind(train=False, ours=True))
    yield _networks()
    yield _table('path', schema.Paths)
    yield _table('train', schema.Train)
    yield from _typed('train → optim_g', Typed(schema.OPTIMIZERS))
    yield from _typed('train → scheduler', Typed(schema.SCHEDULERS))
    yield from _typed('train → pixel_opt', Typed(schema.LOSSES))
    yield from _typed('train → perceptual_opt', Typed(schema.PERCEPTUAL_LOSSES))
    yield _table('train → teacher', schema.Teacher)
    yield _table('train → flat_opt', schema.FlatPictures)
    yield _table('val', schema.TrainVal, 'A test has no `val_freq`.')
    yield from _typed('val → metrics → (a name)', Typed(schema.METRICS))
    yield _table('logger', schema.Logger)
    yield _table('logger → wandb', schema.Wandb)
    yield _table('A study (`ppsr study`)', Study)
    yield _table('A study: data', Data)


def _typed(title: str, kind: Typed) -> Iterator[str]:
    """A table for each section, with all types that share it."""
    types: dict[type[Section], list[str]] = {}
    for name, section in kind.sections.items():
        types.setdefault(section, []).append(name)
    for section, names in types.items():
        yield _table(f'{title}: type {", ".join(names)}', section)


def _table(title: str, section: type[Section], note: str = '') -> str:
    rows = []
    for name, key in section.model_fields.items():
        kind = next(m for m in key.metadata if isinstance(m, Kind))
        meaning = next(m for m in key.metadata if isinstance(m, str))
        nullable = type(None) in get_args(key.annotation)
        default = '**required**' if key.is_required() else _yaml(key.get_default(call_default_factory=True))
        rows.append((f'`{name}`', kind.words + (' or ~' if nullable else ''), default, meaning))
    return _markdown(title, note, ('option', 'value', 'default', 'meaning'), rows)


def _networks() -> str:
    """Settings of our networks: of one name they mean the same in each."""
    rows, defaults, networks = {}, {}, {}
    for name, cls in ARCH_REGISTRY:
        if cls.__module__.startswith('ppsr.'):
            for argument, parameter in network_arguments(cls).items():
                kind, nullable = SETTINGS.get(argument, (Kind(), False))
                rows[argument] = kind.words + (' or ~' if nullable else '')
                defaults.setdefault(argument, {}).setdefault(_yaml(parameter.default), []).append(name)
                networks.setdefault(argument, []).append(name)
    everywhere = max(networks.values(), key=len)
    table = [
        (
            f'`{name}`',
            rows[name],
            _defaults(defaults[name]),
            'all' if networks[name] == everywhere else ', '.join(networks[name]),
        )
        for name in sorted(rows, key=lambda name: networks[name] != everywhere)
    ]
    note = f'`type` is one of {", ".join(everywhere)}, or a registered network of another package.'
    return _markdown('network_g', note, ('option', 'value', 'default', 'of'), table)


def _defaults(names: dict[str, list[str]]) -> str:
    """Defaults by the networks that have them: the most common one, then those of others by name."""
    first, *others = sorted(names, key=lambda default: -len(names[default]))
    return '; '.join([first, *(f'{default} ({", ".join(names[default])})' for default in others)])


def _markdown(title: str, note: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f'## {title}', '', *([note, ''] if note else [])]
    for row in (head, ('---',) * len(head), *rows):
        lines.append('| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |')
    return '\n'.join([*lines, ''])


def _yaml(value: Any) -> str:
    """A default as it would be written in an options file."""
    if value is None:
        return '~'
    if value == '':
        return ''
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return f'`{text.removesuffix("...").strip()}`'


if __name__ == '__main__':
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PATH
    with atomic_path(path) as temporary:
        temporary.write_text(document(), encoding='utf-8')
