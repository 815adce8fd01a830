"""What every diagnostic comes down to: numbers, figures, and the words that explain them."""

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
    """One diagnostic.

    Args:
        name: of its files: ``numbers/<name>.csv``, ``figures/<name>.png``.
        title: heading in the report.
        text: what it shows and how to read it, HTML.
        tables: name → rows; each becomes a CSV file.
        figures: name → figure.
        html: further content of the report, such as coloured text.
        summary: the few numbers that the report shows as a table; each row has the same keys.
        missing: what could not be shown, and why; a diagnostic never shows an empty panel.
    """

    name: str
    title: str
    text: str
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    html: str = ""
    summary: Sequence[Row] = ()
    missing: Sequence[str] = ()
