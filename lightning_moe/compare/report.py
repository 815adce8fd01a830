"""A comparison as Markdown, CSV and a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_moe.compare.groups import Group, differing_settings, shown
from lightning_moe.compare.statistics import Estimate, estimate, paired_difference

#: number of the summary → title, number format and unit of its column
COLUMNS = {
    "loss": ("val loss", ".4f", 1),
    "bits_per_byte": ("bits per byte", ".4f", 1),
    "max_load": ("max/mean load", ".2f", 1),
    "fanout_mean": ("mean fanout", ".2f", 1),
    "flops_per_token": ("active MFLOPs/token", ",.2f", 10**6),
    "tokens_per_second": ("tokens/s", ",.0f", 1),
}
LEGEND = (
    "Mean over seeds ± half of its 95% interval (Student's t); a single run has none. max/mean load: the busiest "
    "expert of the worst layer; mean fanout: routed experts per token; both on validation text. FLOPs: forward and "
    "backward, active parameters, at the fanout that was asked for."
)


@dataclass(frozen=True)
class Row:
    """One group's numbers.

    Args:
        group: the group.
        estimates: mean over seeds of each of ``COLUMNS``; null where no run has the number (load of a dense model).
        difference: of the validation loss to the baseline's, paired by seed; null for the baseline itself, without
            one, and without a common seed.
    """

    group: Group
    estimates: dict[str, Estimate | None]
    difference: Estimate | None


def rows(groups: Sequence[Group], baseline: Group | None) -> list[Row]:
    """The table's rows, in the order of the groups."""
    table = []
    for group in groups:
        values = {name: list(group.values(name).values()) for name in COLUMNS}
        estimates = {name: estimate(found) if found else None for name, found in values.items()}
        with_baseline = baseline is not None and group is not baseline
        difference = paired_difference(group.values("loss"), baseline.values("loss")) if with_baseline else None  # type: ignore[union-attr]
        table.append(Row(group, estimates, difference))
    return table


def markdown(table: Sequence[Row], baseline: Group | None, notes: Sequence[str]) -> str:
    """The comparison as a Markdown page."""
    titles = ["routing", "seeds", *(title for title, _, _ in COLUMNS.values())]
    titles += ["Δ val loss to baseline", "interval excludes 0"] if baseline else []
    body = []
    for row in table:
        cells = [row.group.label, ", ".join(map(str, sorted(row.group.runs)))]
        cells += [cell(row.estimates[name], form, unit) for name, (_, form, unit) in COLUMNS.items()]
        if baseline is not None:
            cells += ["baseline", ""] if row.group is baseline else difference_cells(row.difference)
        body.append(cells)
    lines = [*_aligned([titles, *body]), "", LEGEND]
    if baseline is not None:
        lines.append(f"Δ: minus the run of {baseline.label} with the same seed; below 0 is better.")
    labels = [row.group.label for row in table]
    differing = differing_settings([row.group for row in table])
    untold = {k: v for k, v in differing.items() if not all(f"{k.rpartition('.')[2]}=" in label for label in labels)}
    if untold:
        lines += ["", "Settings outside of the routing rule that differ:", ""]
        for key, values in untold.items():
            each = "; ".join(f"{label}: {shown(value)}" for label, value in zip(labels, values, strict=True))
            lines.append(f"- `{key}`: {each}")
    lines += ["", *(f"- Note: {note}" for note in notes)] if notes else []
    return "\n".join(lines) + "\n"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table that also reads well as it is, in a terminal; the first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [padded[0], ["-" * width for width in widths], *padded[1:]]]


def comma_separated(table: Sequence[Row]) -> str:
    """The comparison as CSV: for each number its mean and its interval's half width."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    names = [*COLUMNS, "loss_difference"]
    writer.writerow(["routing", "seeds", *(f"{n}{end}" for n in names for end in ("", "_half_width")), "excludes_zero"])
    for row in table:
        cells: list[Any] = [row.group.label, " ".join(map(str, sorted(row.group.runs)))]
        for found in [*row.estimates.values(), row.difference]:
            cells += ["", ""] if found is None else [found.mean, "" if found.half_width is None else found.half_width]
        excludes = row.difference.excludes_zero if row.difference else None
        writer.writerow([*cells, "" if excludes is None else str(excludes).lower()])
    return output.getvalue()


def figure(table: Sequence[Row], baseline: Group | None) -> bytes:
    """PNG: validation loss of each group, its seeds and its interval; beside it the differences to the baseline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 1 if baseline is None else 2
    drawing = Figure(figsize=(4.2 * panels + 2.6, 0.42 * len(table) + 1.5), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(1, panels, sharey=True, squeeze=False)[0]
    positions = list(range(len(table)))[::-1]
    for position, row in zip(positions, table, strict=True):
        seeds = list(row.group.values("loss").values())
        axes[0].plot(seeds, [position] * len(seeds), "o", color="#7f9ab8", markersize=4, zorder=2)
        _interval(axes[0], position, row.estimates["loss"])
        if baseline is not None and row.difference is not None:
            _interval(axes[1], position, row.difference)
    axes[0].set_yticks(positions, [row.group.label for row in table], fontsize=9)
    axes[0].set_ylim(-0.6, len(table) - 0.4)
    axes[0].set_xlabel("validation loss (nats per token)")
    if baseline is not None:
        axes[1].axvline(0, color="0.4", linewidth=1, linestyle="--")
        axes[1].set_xlabel(f"difference to {baseline.label}, same seed")
    for one in axes:
        one.grid(axis="x", color="0.9")
        one.spines[["top", "right"]].set_visible(False)
    drawing.suptitle("Mean over seeds with its 95% interval; small dots: single runs", fontsize=10)
    image = io.BytesIO()
    drawing.savefig(image, format="png", dpi=150)
    return image.getvalue()


def _interval(axes: Any, position: int, found: Estimate | None) -> None:
    if found is not None:
        width = found.half_width or 0.0
        axes.errorbar(found.mean, position, xerr=width, fmt="D", color="#1b3a5c", markersize=5, capsize=3, zorder=3)


def cell(found: Estimate | None, form: str, unit: float = 1) -> str:
    """Mean ± half width in the number format ``form``, both in ``unit``."""
    if found is None:
        return "–"
    width = "" if not found.half_width else f" ± {found.half_width / unit:{form.lstrip('+')}}"
    return f"{found.mean / unit:{form}}{width}"


def difference_cells(difference: Estimate | None) -> list[str]:
    """The difference to the baseline, and whether its interval excludes 0."""
    if difference is None:
        return ["no common seed", ""]
    if difference.half_width is None:
        return [f"{difference.mean:+.4f}", "unknown: one common seed"]
    return [f"{difference.mean:+.4f} ± {difference.half_width:.4f}", "yes" if difference.excludes_zero else "no"]
