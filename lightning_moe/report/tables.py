"""Tables as text, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def text_table(rows: Sequence[Sequence[str]], right: Collection[int] = (), indent: str = "") -> str:
    """Lay out cells in columns, two spaces apart, without spaces at the ends of lines.

    Args:
        rows: cells of each line, equally many.
        right: columns aligned on the right, such as numbers; the others are aligned on the left.
        indent: text before each line.
    """
    return "\n".join(f"{indent}{'  '.join(cells)}".rstrip() for cells in _padded(rows, right))


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out cells as a Markdown table that also reads well in a terminal; the first row is the header."""
    head, *body = _padded(rows)
    rule = ["-" * len(cell) for cell in head]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *body])


def _padded(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)] for row in rows
    ]


def csv_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Write rows as CSV with a header; floats keep their full precision, and `None` is an empty cell.

    Args:
        rows: column → value; a missing column is an empty cell.
        columns: order of the columns; by default that in which they first occur.
    """
    if columns is None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def shown(value: Any) -> str:
    """Format a setting's value for a label: numbers to four digits, ``none`` for `None`."""
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def json_numbers(value: Any) -> Any:
    """Return a copy of nested dicts and lists with `None` for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: json_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_numbers(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
