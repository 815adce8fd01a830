"""The parts of every diagnostic: numbers, figures, and the text that explains them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = str | int | float | bool | None
Row = Mapping[str, Value]


@dataclass(frozen=True)
class Section:
    """One diagnostic of the report.

    Args:
        name: name of its files, ``numbers/<name>.csv`` and ``figures/<name>.png``.
        title: heading in the report.
        text: HTML that says what it shows and how to read it.
        tables: rows by the table's name; each table becomes a CSV file.
        figures: figures by name.
        html: further content of the report, such as coloured text.
        summary: numbers that the report shows as a table; each row has the same keys.
        missing: notes on what could not be shown, and why. A diagnostic never shows an empty panel.
    """

    name: str
    title: str
    text: str
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    html: str = ""
    summary: Sequence[Row] = ()
    missing: Sequence[str] = ()
