"""How options are declared: sections (pydantic models) whose keys say their type, their range and their meaning once.

>>> from typing import Annotated
>>> class Optimizer(Section):
...     lr: Annotated[float, Number(above=0, most=10), 'learning rate']
...     betas: Annotated[list, Several(Number(0, below=1), 2), 'of the running means'] = [0.9, 0.999]
>>> check(Optimizer, {'lr': 1}, 'train → optim_g')
{'lr': 1, 'betas': [0.9, 0.999]}
>>> check(Optimizer, {'lr': -1}, 'train → optim_g')
Traceback (most recent call last):
    ...
ppsr.errors.UserError: train → optim_g → lr must be a number above 0 and at most 10, not -1.

A new key is one line in its section: ``name: Annotated[type, kind, 'what it does'] = default``; without a default it
has to be given, and ``type | None`` makes ``~`` a value. Errors and docs/options.md are written from that line.
"""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, ValidationInfo, create_model
from pydantic_core import CoreSchema, core_schema

from ppsr.errors import UserError

__all__ = [
    'Choice',
    'Each',
    'Either',
    'FileName',
    'FilePath',
    'Kind',
    'Nested',
    'Number',
    'Section',
    'Several',
    'Text',
    'Truth',
    'Typed',
    'Whole',
    'check',
    'join',
    'nearest',
    'nothing_required',
    'of_signature',
    'show',
]

PLAIN_NAME = re.compile(r'[\w+@=,.-]*[\w+@=,-][\w+@=,.-]*')  # becomes a folder or file name: no separators, not '..'
MAX_NAME = 100  # characters; the names of files add iteration numbers and suffixes to it
MAX_TEXT = 4096
SHOWN = 80  # characters of a wrong value in a message


class Kind:
    """What a value must be.

    A subclass says it in `words` (… must be `words`, not …) and reads a value: what it returns is taken, and a
    ValueError, whose text may be empty or a hint, refuses.
    """

    words = 'anything'

    def read(self, value: Any, where: str) -> Any:
        return value

    def __call__(self, value: Any, where: str) -> Any:
        """The value, checked.

        Raises:
            UserError: it is none.
        """
        try:
            return self.read(value, where)
        except ValueError as e:
            hint = f' ({e})' if str(e) else ''
            raise UserError(f'{where} must be {self.words}, not {show(value)}{hint}.') from None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        optional = type(None) in get_args(source)

        def validate(value: Any, info: ValidationInfo) -> Any:
            if value is None and optional:
                return None
            return self(value, join((info.context or {}).get('where', 'options'), info.field_name))

        return core_schema.with_info_plain_validator_function(validate)


class Number(Kind):
    """A finite number of a range, int or float."""

    noun = 'a number'

    def __init__(self, least=None, most=None, above=None, below=None):
        self.least, self.most, self.above, self.below = least, most, above, below
        if None not in (least, most) and least == most:
            ends = [f'that is {least}']
        elif None not in (least, most):
            ends = [f'from {least} to {most}']
        else:
            ends = [
                f'{word} {end}'
                for word, end in (('of at least', least), ('above', above), ('below', below), ('at most', most))
                if end is not None
            ]
        self.words = ' '.join([self.noun, ' and '.join(ends)]).strip()

    def read(self, value, where):
        if isinstance(value, str):
            raise ValueError(_number_hint(value))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
            raise ValueError
        fits = (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        if not fits:
            raise ValueError
        return value


class Whole(Number):
    """A whole number of a range; 5.0e+5 is one, and becomes an int."""

    noun = 'a whole number'

    def read(self, value, where):
        value = super().read(value, where)
        if value != int(value):
            raise ValueError
        return int(value)


class Truth(Kind):
    """true or false; YAML's unquoted yes, no, on and off are that, too."""

    words = 'true or false'

    def read(self, value, where):
        if not isinstance(value, bool):
            raise ValueError('write it without quotes' if isinstance(value, str) else '')
        return value


class Text(Kind):
    """Text that is not empty."""

    words = 'text'

    def read(self, value, where):
        if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT or '\0' in value:
            raise ValueError
        return value


class FilePath(Text):
    words = 'the path of a file or folder'


class FileName(Kind):
    """Text that becomes a folder or a part of a file name."""

    words = f'a file name: at most {MAX_NAME} letters, digits and _ + @ = , . -'

    def __call__(self, value, where):
        if not isinstance(value, str) or not PLAIN_NAME.fullmatch(value) or len(value) > MAX_NAME:
            raise UserError(
                f'{where}: {show(value)} becomes a file name; use at most {MAX_NAME} letters, digits and '
                '_ + @ = , . - only.'
            )
        return value


class Choice(Kind):
    """One of some words or numbers."""

    def __init__(self, *values):
        self.values = values
        self.words = ('one of ' if len(values) > 1 else '') + ', '.join(map(str, values))

    def read(self, value, where):
        if not any(type(value) is type(v) and value == v for v in self.values):
            raise ValueError
        return value


class Either(Kind):
    """What any of several kinds takes; the first that does."""

    def __init__(self, *kinds: Kind):
        self.kinds = kinds
        self.words = ' or '.join(kind.words for kind in kinds)

    def read(self, value, where):
        hint = ''
        for kind in self.kinds:
            try:
                return kind.read(value, where)
            except ValueError as e:
                hint = hint or str(e)
        raise ValueError(hint)


class Several(Kind):
    """A list of values of one kind: `count` of them, or from `least` to `most`."""

    def __init__(self, kind: Kind, count: int | None = None, least: int = 1, most: int = 1000):
        self.kind = kind
        self.least, self.most = (least, most) if count is None else (count, count)
        self.words = f'a list{"" if count is None else f" of {count}"}, each {kind.words}'

    def read(self, value, where):
        if not isinstance(value, (list, tuple)) or not self.least <= len(value) <= self.most:
            raise ValueError
        return [self.kind.read(v, where) for v in value]


class Each(Kind):
    """A mapping whose values are of one kind, under names of the user's choice."""

    def __init__(self, kind: Kind, least: int = 0):
        self.kind, self.least = kind, least
        self.words = f'a mapping of names to values, each {kind.words}'

    def read(self, value, where):
        if not isinstance(value, Mapping) or len(value) < self.least:
            raise ValueError
        return {key: self.kind(v, f'{where} → {key}') for key, v in value.items()}


class Section(BaseModel):
    """Keys that stand together, each ``name: Annotated[type, kind, 'what it does'] = default``. Others are refused.

    A subclass with ``extra='allow'`` is open: keys that it does not declare are handed on as they are, for code of
    other packages. What concerns several keys is checked in :meth:`together`.
    """

    model_config = ConfigDict(extra='forbid', protected_namespaces=())
    complete: ClassVar[bool] = True  # defaults are filled in

    @classmethod
    def together(cls, values: dict, where: str) -> None:
        """Refuse (UserError) values that do not go together; each for itself has been checked."""


class Nested(Kind):
    """A section in a section."""

    def __init__(self, section: type[Section]):
        self.section = section
        self.words = 'a mapping of options'

    def __call__(self, value, where):
        return check(self.section, value, where)


class Typed(Kind):
    """A section whose key `type` says which one it is.

    Args:
        sections: by type.
        others: makes the section for a type that is not among them, or returns None where there is no such thing.
    """

    words = 'a mapping of options with a type'

    def __init__(self, sections: Mapping[str, type[Section]], others: Callable[[str], type[Section] | None] = None):
        self.sections, self.others = dict(sections), others

    def section_of(self, kind: str) -> type[Section] | None:
        return self.sections.get(kind) or (self.others(kind) if self.others else None)

    def __call__(self, value, where):
        if not isinstance(value, Mapping):
            raise UserError(f'{where} must be {self.words}, not {show(value)}.')
        kind = value.get('type')
        if kind is None:
            raise UserError(f'{where} lacks type; there are {", ".join(self.sections)}.')
        section = self.section_of(kind) if isinstance(kind, str) else None
        if section is None:
            known = ', '.join(self.sections)
            raise UserError(f'{where} → type: {show(kind)} is not one of {known}{nearest(kind, self.sections)}.')
        return {'type': kind} | check(section, {k: v for k, v in value.items() if k != 'type'}, where)


def check(section: type[Section], values: Any, where: str) -> dict:
    """The values of a section, checked and completed with its defaults; open sections keep what they do not declare.

    Args:
        section: what is declared.
        values: a mapping, as it was read.
        where: what a message names as the place of the mistake.

    Raises:
        UserError: the first mistake, in one sentence.
    """
    if not isinstance(values, Mapping):
        raise UserError(f'{where} must be a mapping of options, not {show(values)}.')
    try:
        found = dict(section.model_validate(dict(values), context={'where': where}))
    except ValidationError as e:
        errors = sorted(e.errors(include_url=False), key=lambda error: error['type'] != 'extra_forbidden')
        key = errors[0]['loc'][0]  # pydantic's own errors are of two kinds; values are refused by Kind
        if errors[0]['type'] == 'missing':
            raise UserError(f'{where.rstrip(":")} lacks {key}.') from None
        known = list(section.model_fields)
        raise UserError(
            f'{where.rstrip(":")}: unknown option {key!r}{nearest(key, known)}; known are {", ".join(known)}.'
        ) from None
    section.together(found, where)
    return found if section.complete else {key: value for key, value in found.items() if key in values}


def nothing_required(section: type[Section]) -> type[Section]:
    """The same section where no key has to be given; those that are left out without a default are None."""
    keys = {n: (Annotated[(key.annotation, *key.metadata)], None) for n, key in section.model_fields.items()}
    return create_model(
        section.__name__, __base__=section, **{n: k for n, k in keys.items() if section.model_fields[n].is_required()}
    )


def of_signature(function: Callable, given: Sequence[str] = (), **kinds: Any) -> type[Section]:
    """The section of a function or class of another package: its arguments' names are checked, their values are its own
    business.

    Args:
        given: arguments that are not options.
        kinds: further keys, as ``name=(Annotated[…], default)``.
    """
    parameters = list(inspect.signature(function).parameters.values())
    keys = {}
    for p in parameters:
        if p.name not in given and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and not p.name.startswith('_'):
            keys[p.name] = (Any, ... if p.default is p.empty else None)
    open_ended = any(p.kind is p.VAR_KEYWORD or p.name.startswith('_') for p in parameters)

    class Arguments(Section, extra='allow' if open_ended else 'forbid'):
        complete = False

    return create_model(function.__name__, __base__=Arguments, **keys | kinds)


def join(where: str, key: str) -> str:
    """The place of a key in a section: 'train → lr', or 'options file x.yml: name' at the top."""
    return f'{where} {key}' if where.endswith(':') else f'{where} → {key}'


def nearest(key: Any, known: Sequence[str]) -> str:
    """', did you mean …?' where a known key is much alike, or ''."""
    close = difflib.get_close_matches(str(key)[:MAX_NAME], list(known), 1, 0.6)
    return f' (did you mean {close[0]}?)' if close else ''


def show(value: Any) -> str:
    """A value for a message, shortened."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of more than 4300 digits
        text = 'a number of thousands of digits'
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + '…'


def _number_hint(text: str) -> str:
    try:
        float(text)
    except ValueError:
        return ''
    return 'YAML reads 1e-4 as text: write 1.0e-4' if 'e' in text.lower() else 'write it without quotes'
