"""Sections that commands write into documents."""

import pytest
from support import REPOSITORY

from ppsr.errors import UserError
from ppsr.generated import write_section


def test_hand_written_lines_stay(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text(
        '# Mine\n\n<!-- begin a -->\nold\n<!-- end a -->\nbetween ×\n<!-- begin b -->\n<!-- end b -->\nlast\n'
    )
    write_section(page, 'a', '| 1 |\n\n')
    write_section(page, 'b', 'two')
    assert page.read_text() == (
        '# Mine\n\n<!-- begin a -->\n| 1 |\n<!-- end a -->\nbetween ×\n<!-- begin b -->\ntwo\n<!-- end b -->\nlast\n'
    )
    before = page.read_text()
    write_section(page, 'b', 'two')
    assert page.read_text() == before


def test_a_new_document_and_a_new_section(tmp_path):
    page = tmp_path / 'docs' / 'page.md'
    write_section(page, 'a', 'x')
    assert page.read_text() == '<!-- begin a -->\nx\n<!-- end a -->\n'
    write_section(page, 'b', 'y')
    assert page.read_text() == '<!-- begin a -->\nx\n<!-- end a -->\n\n<!-- begin b -->\ny\n<!-- end b -->\n'


@pytest.mark.parametrize(
    'text',
    ['<!-- begin a -->', '<!-- end a -->', '<!-- end a --> <!-- begin a -->', 2 * '<!-- begin a --><!-- end a -->'],
)
def test_markers_that_are_no_pair_lose_nothing(tmp_path, text):
    page = tmp_path / 'page.md'
    page.write_text(text)
    with pytest.raises(UserError, match="'a' wants one"):
        write_section(page, 'a', 'new')
    assert page.read_text() == text


def test_markers_in_the_documents_are_pairs():
    for page in [REPOSITORY / 'README.md', *(REPOSITORY / 'docs').rglob('*.md')]:
        text = page.read_text(encoding='utf-8')
        names = [line.split()[2] for line in text.splitlines() if line.startswith('<!-- begin ')]
        ends = [line.split()[2] for line in text.splitlines() if line.startswith('<!-- end ')]
        assert names == ends and len(set(names)) == len(names), page
