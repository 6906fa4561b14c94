"""Declared options: every kind takes what it says and refuses the rest in a sentence that says what it takes."""

import doctest
import math
from typing import Annotated

import pytest

import ppsr.schema
from ppsr.errors import UserError
from ppsr.schema import (
    Choice,
    Each,
    Either,
    FileName,
    Number,
    Section,
    Several,
    Text,
    Truth,
    Typed,
    Whole,
    check,
    of_signature,
)


def test_examples_in_the_docs():
    assert doctest.testmod(ppsr.schema) == (0, 4)


@pytest.mark.parametrize(
    ('kind', 'taken', 'refused'),
    [
        (Whole(1, 5), [1, 5, 2.0], [0, 6, 1.5, True, '1', None, math.nan, math.inf, 10**400, [1]]),
        (Number(0, below=1), [0, 0.5], [1, -1e-9, math.nan, False, '0.5', -math.inf]),
        (Number(above=0, most=2), [1e-300, 2], [0, 2.1, 10**400]),
        (Truth(), [True, False], ['no', 'true', 0, 1, None, []]),
        (Text(), ['x'], ['', 'a\0b', 5, None, 'x' * 5000]),
        (FileName(), ['a', '日本', 'a.b_c-d', '...x'], ['', '.', '..', 'a/b', 'a\\b', 'a b', '~', 'x' * 101, 5, 'a\n']),
        (Choice('a', 3), ['a', 3], ['b', 3.0, True, None, [3]]),
        (Choice(1), [1], [True, 1.0]),
        (Either(Whole(0, 9), Choice('auto')), [0, 'auto'], [-1, 'x', 1.5, None]),
        (Several(Whole(1, 3), 2), [[1, 2], (3, 3)], [[], [1], [1, 2, 3], [1, 4], 1, '12', {1: 2}]),
        (Several(Text(), least=0), [[], ['a']], [None, [5]]),
        (Each(Number(0, 1), least=1), [{'a': 1}], [{}, {'a': 2}, [], 5]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ppsr.schema.Kind) else '',
)
def test_kinds(kind, taken, refused):
    for value in taken:
        assert kind(value, 'here') == (list(value) if isinstance(value, tuple) else value)
    for value in refused:
        with pytest.raises(UserError, match='^here') as e:
            kind(value, 'here')
        assert '\n' not in str(e.value) and len(str(e.value)) < 300


def test_a_whole_number_becomes_an_int():
    assert type(Whole(1, 10**6)(5.0e5, 'x')) is int


@pytest.mark.parametrize(
    ('value', 'hint'),
    [('1e-4', 'write 1.0e-4'), ('3', 'without quotes'), ('abc', "not 'abc'.")],
)
def test_text_where_a_number_belongs(value, hint):
    with pytest.raises(UserError, match=hint):
        Number(0, 9)(value, 'lr')


class Small(Section):
    size: Annotated[int, Whole(1, 9), 'of it']
    name: Annotated[str | None, Text(), 'of it'] = None
    sizes: Annotated[list, Several(Whole(1, 9)), 'of them'] = [1]

    @classmethod
    def together(cls, values, where):
        if values['size'] == 9 and values['name']:
            raise UserError(f'{where}: no.')


class Open(Small, extra='allow'):
    pass


def test_a_section_is_completed_and_closed():
    assert check(Small, {'size': 3, 'name': None}, 'x') == {'size': 3, 'name': None, 'sizes': [1]}
    for values, words in (
        ({}, 'x lacks size'),
        ({'siez': 3}, r"x: unknown option 'siez' \(did you mean size\?\); known are size, name, sizes"),
        ({'size': 3, 'zzz': 1}, "x: unknown option 'zzz'; known are"),
        ({'size': 0}, 'x → size must be a whole number from 1 to 9, not 0'),
        ({'size': 9, 'name': 'n'}, 'x: no'),
        ([], r'x must be a mapping of options, not \[\]'),
    ):
        with pytest.raises(UserError, match=words):
            check(Small, values, 'x')
    with pytest.raises(UserError, match='^file x.yml lacks size'):
        check(Small, {}, 'file x.yml:')
    with pytest.raises(UserError, match='^file x.yml: size must be'):
        check(Small, {'size': 0}, 'file x.yml:')


def test_an_open_section_hands_on_what_it_does_not_know():
    assert check(Open, {'size': 1, 'other': {'a': 1}}, 'x')['other'] == {'a': 1}
    with pytest.raises(UserError, match='size'):
        check(Open, {'size': 0}, 'x')


def test_defaults_are_not_shared():
    check(Small, {'size': 1}, 'x')['sizes'].append(5)
    assert check(Small, {'size': 1}, 'x')['sizes'] == [1]


def test_a_section_by_type():
    kind = Typed({'small': Small}, lambda name: Open if name == 'open' else None)
    assert kind({'type': 'small', 'size': 1}, 'x') == {'type': 'small', 'size': 1, 'name': None, 'sizes': [1]}
    assert kind({'type': 'open', 'size': 1, 'y': 2}, 'x')['y'] == 2
    for value, words in (
        ({'type': 'smal'}, r"x → type: 'smal' is not one of small \(did you mean small\?\)"),
        ({'size': 1}, 'x lacks type'),
        ({'type': ['small']}, 'x → type'),
        ('small', 'x must be a mapping of options with a type'),
    ):
        with pytest.raises(UserError, match=words):
            kind(value, 'x')


def test_the_section_of_a_signature():
    def loss(a, b=2, *, c=3):
        pass

    assert check(of_signature(loss), {'a': {'any': 'thing'}, 'c': 0}, 'x') == {'a': {'any': 'thing'}, 'c': 0}
    for values in ({}, {'a': 1, 'd': 1}):
        with pytest.raises(UserError):
            check(of_signature(loss), values, 'x')
    assert check(of_signature(lambda a, **rest: None), {'a': 1, 'd': 2}, 'x') == {'a': 1, 'd': 2}
