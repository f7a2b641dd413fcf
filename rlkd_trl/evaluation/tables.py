"""Lays out tables of text, for the terminal and in Markdown."""

import math
from collections.abc import Sequence
from numbers import Real

from tabulate import SEPARATING_LINE, DataRow, Line, TableFormat, tabulate

MISSING = "–"
_ROW = DataRow("|", "|", "|")


def _markdown_rule(widths: Sequence[int], alignments: Sequence[str]) -> str:
    return f"| {' | '.join([':--', *['--:'] * (len(widths) - 1)])} |"


# Two spaces between columns. Heads are an ordinary row: `tabulate` makes a column wider than its head otherwise.
_PLAIN = TableFormat(None, Line("", "-", "  ", ""), None, None, DataRow("", "  ", ""), DataRow("", "  ", ""), 0, None)
_MARKDOWN = TableFormat(None, _markdown_rule, None, None, _ROW, _ROW, 1, None)


def plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, labels: int = 1, rule: bool = True) -> str:
    """A table with columns as wide as their widest cell: the first `labels` columns left-aligned, the others right.

    rule: underline the heads. Spaces in a cell, also at its ends, are kept.
    """
    lines = [list(heads), *([SEPARATING_LINE] if rule else []), *map(list, rows)]
    return tabulate(
        lines,
        tablefmt=_PLAIN,
        colalign=["left"] * labels + ["right"] * (len(heads) - labels),
        disable_numparse=True,
        preserve_whitespace=True,
    )


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: labels, then right-aligned columns. A cell's line breaks and "|" cannot break the table."""
    lines = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in [heads, *rows]]
    return tabulate(lines[1:], headers=lines[0], tablefmt=_MARKDOWN, stralign=None, disable_numparse=True)


def number(value: object, number_format: str) -> str:
    """A number as a cell's text; `MISSING` for NaN and for everything that is not a number."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return format(value, number_format) if is_number and not math.isnan(value) else MISSING
