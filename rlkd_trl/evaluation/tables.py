"""Tables of text, for the terminal and in Markdown: the one place that lays them out."""

import math
from collections.abc import Sequence
from numbers import Real

from tabulate import SEPARATING_LINE, DataRow, Line, TableFormat, tabulate

MISSING = "–"
_ROW = DataRow("|", "|", "|")


def _markdown_rule(widths: Sequence[int], alignments: Sequence[str]) -> str:
    return f"| {' | '.join([':--', *['--:'] * (len(widths) - 1)])} |"


# Two spaces between columns. The heads are a row like others: `tabulate` would make each column wider than its head.
_PLAIN = TableFormat(None, Line("", "-", "  ", ""), None, None, DataRow("", "  ", ""), DataRow("", "  ", ""), 0, None)
_MARKDOWN = TableFormat(None, _markdown_rule, None, None, _ROW, _ROW, 1, None)


def plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, labels: int = 1, rule: bool = True) -> str:
    """Columns as wide as their widest cell; the first `labels` to the left, numbers to the right.

    rule: underline the heads. Spaces in a cell, at its ends too, stay.
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
    """A label and, to the right, numbers. A cell may hold other markup, but ends neither itself nor its line."""
    lines = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in [heads, *rows]]
    return tabulate(lines[1:], headers=lines[0], tablefmt=_MARKDOWN, stralign=None, disable_numparse=True)


def number(value: object, number_format: str) -> str:
    """A number as a cell; whatever is none, and NaN, is shown as missing."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return format(value, number_format) if is_number and not math.isnan(value) else MISSING
