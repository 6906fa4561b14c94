"""Figures in documents that a command prints: written between two markers, so that making them again changes no line
that a hand wrote.

    <!-- begin tiles -->
    … what the command printed …
    <!-- end tiles -->
"""

import re
from pathlib import Path

from ppsr.atomic import atomic_path
from ppsr.errors import UserError

__all__ = ['section_names', 'write_section']


def section_names(path: str | Path) -> list[str]:
    """The sections of a document, in its order.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return re.findall(r'<!-- begin (\S+) -->', Path(path).read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'{path}: cannot be read ({getattr(e, "strerror", None) or e}).') from e


def write_section(path: str | Path, name: str, text: str) -> None:
    """Put `text` between the markers of section `name`; whole or not at all.

    A document that does not exist is made; one without the section gets it at its end.

    Args:
        path: a Markdown file, UTF-8.
        name: of the section, as its markers have it; one word.
        text: what stands between them from now on, without markers.

    Raises:
        UserError: the markers are not one pair in order, or the file cannot be read or written.
    """
    path, begin, end = Path(path), f'<!-- begin {name} -->', f'<!-- end {name} -->'
    try:
        old = path.read_text(encoding='utf-8') if path.exists() else ''
        if begin not in old and end not in old:
            before, after = old + ('\n' if old else ''), '\n'
        elif old.count(begin) == old.count(end) == 1 and old.index(begin) < old.index(end):
            before, after = old[: old.index(begin)], old[old.index(end) + len(end) :]
        else:
            raise UserError(f'{path}: the section {name!r} wants one {begin} and one {end} behind it.')
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(f'{before}{begin}\n{text.strip()}\n{end}{after}', encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'{path}: cannot be read or written ({getattr(e, "strerror", None) or e}).') from e
