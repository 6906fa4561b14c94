"""Tables for people and papers: one table, written as aligned text, Markdown, CSV or LaTeX."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ['Table']

_LATEX = {'&': r'\&', '%': r'\%', '#': r'\#', '_': r'\_', '×': r'$\times$', '−': '$-$', '±': r'$\pm$', '→': r'$\to$'}


@dataclass
class Table:
    """A table of strings and numbers.

    Args:
        header: name of each column, with its unit.
        rows: one value a column; numbers are written as the format of their column says, None as an empty cell.
        formats: format specification of the numbers of a column ('.2f'); '' writes them as they are.
        caption: one line above the table.
        notes: lines below the table.
    """

    header: Sequence[str]
    rows: list[Sequence] = field(default_factory=list)
    formats: Sequence[str] = ()
    caption: str = ''
    notes: list[str] = field(default_factory=list)

    def cells(self, thousands: str = ',') -> list[list[str]]:
        """The rows as text; `thousands` takes the place of the separator that a format asks for."""
        formats = [form.replace(',', thousands) for form in [*self.formats, *[''] * len(self.header)]]

        def write(value, form: str) -> str:
            if value is None:
                return ''
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            return format(value, form) if number else str(value)

        return [[write(value, form) for value, form in zip(row, formats)] for row in self.rows]

    def _numeric(self, column: int) -> bool:
        return any(isinstance(row[column], (int, float)) for row in self.rows)

    def text(self) -> str:
        """Aligned columns for a terminal."""
        cells = [list(self.header), *self.cells()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.header))]
        lines = [self.caption] if self.caption else []
        for number, row in enumerate(cells):
            padded = (
                cell.rjust(width) if self._numeric(i) else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            )
            lines.append('  '.join(padded).rstrip())
            if number == 0:
                lines.append('  '.join('-' * width for width in widths))
        return '\n'.join(lines + self.notes) + '\n'

    def markdown(self) -> str:
        """A GitHub table; numbers are flush right."""
        rule = ['---:' if self._numeric(i) else '---' for i in range(len(self.header))]
        rows = [list(self.header), rule, *self.cells()]
        table = '\n'.join('| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |' for row in rows)
        return '\n\n'.join([part for part in (self.caption, table, *self.notes) if part]) + '\n'

    def csv(self) -> str:
        """Comma-separated values with a header line, for programs."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator='\n')
        writer.writerow(self.header)
        writer.writerows(self.cells(thousands=''))
        return buffer.getvalue()

    def latex(self, label: str = '') -> str:
        """A floating table with the rules of the booktabs package."""

        def escape(text: str) -> str:
            return ''.join(_LATEX.get(character, character) for character in text)

        columns = ''.join('r' if self._numeric(i) else 'l' for i in range(len(self.header)))
        body = [' & '.join(map(escape, row)) + r' \\' for row in self.cells()]
        head = ' & '.join(map(escape, self.header)) + r' \\'
        note = escape(' '.join([self.caption, *self.notes]).strip())
        return '\n'.join(
            [
                r'\begin{table}[t]',
                r'\centering',
                rf'\caption{{{note}}}',
                *([rf'\label{{{label}}}'] if label else []),
                rf'\begin{{tabular}}{{{columns}}}',
                r'\toprule',
                head,
                r'\midrule',
                *body,
                r'\bottomrule',
                r'\end{tabular}',
                r'\end{table}',
                '',
            ]
        )
