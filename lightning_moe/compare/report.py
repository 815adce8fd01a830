"""A comparison as Markdown, CSV and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_moe.compare.groups import Group, differing_settings
from lightning_moe.compare.statistics import Estimate, estimate, paired_difference
from lightning_moe.metrics.catalogue import MetricInfo, shown_in
from lightning_moe.report.figures import COLORS, GREY, grid, png, wrapped
from lightning_moe.report.tables import csv_table, markdown_table, shown

METRICS = shown_in("comparison")
LEGEND = (
    "Mean over seeds ± half of its 95% interval (Student's t); a single run has none. max/mean load: the busiest "
    "expert of the worst layer; mean fanout: routed experts per token; both on validation text. FLOPs: forward and "
    "backward, active parameters, at the fanout that was asked for."
)


@dataclass(frozen=True)
class GroupResult:
    """One group's numbers.

    Args:
        group: group of the numbers.
        estimates: name of each of ``METRICS`` → mean over seeds; `None` if no run has the number (load of a
            dense model).
        difference: validation loss minus the baseline's, paired by seed; `None` for the baseline itself, without a
            baseline, and without a common seed.
    """

    group: Group
    estimates: dict[str, Estimate | None]
    difference: Estimate | None

    @property
    def seeds(self) -> list[int]:
        return sorted(self.group.runs)


def rows(groups: Sequence[Group], baseline: Group | None) -> list[GroupResult]:
    """Compute the rows of the table: one per group, in the order of the groups."""
    results = []
    for group in groups:
        values = {metric.name: list(group.values(metric.name).values()) for metric in METRICS}
        estimates = {name: estimate(found) if found else None for name, found in values.items()}
        is_baseline = baseline is None or group is baseline
        difference = None if is_baseline else paired_difference(group.values("loss"), baseline.values("loss"))  # type: ignore[union-attr]
        results.append(GroupResult(group, estimates, difference))
    return results


def markdown(results: Sequence[GroupResult], baseline: Group | None, notes: Sequence[str]) -> str:
    """Write the comparison as a Markdown page."""
    titles = ["routing", "seeds", *headings(METRICS)]
    titles += ["Δ val loss to baseline", "interval excludes 0"] if baseline else []
    body = []
    for result in results:
        cells = [result.group.label, ", ".join(map(str, result.seeds)), *estimate_cells(result, METRICS)]
        if baseline is not None:
            cells += ["baseline", ""] if result.group is baseline else difference_cells(result.difference)
        body.append(cells)
    lines = [markdown_table([titles, *body]), "", LEGEND]
    if baseline is not None:
        lines.append(f"Δ: minus the run of {baseline.label} with the same seed; below 0 is better.")
    labels = [result.group.label for result in results]
    differing = differing_settings([result.group for result in results])
    untold = {k: v for k, v in differing.items() if not all(f"{k.rpartition('.')[2]}=" in label for label in labels)}
    if untold:
        lines += ["", "Settings outside of the routing rule that differ:", ""]
        for key, values in untold.items():
            each = "; ".join(f"{label}: {shown(value)}" for label, value in zip(labels, values, strict=True))
            lines.append(f"- `{key}`: {each}")
    lines += ["", *(f"- Note: {note}" for note in notes)] if notes else []
    return "\n".join(lines) + "\n"


def comma_separated(results: Sequence[GroupResult]) -> str:
    """Write the comparison as CSV: for each number its mean and its interval's half width."""
    rows = []
    for result in results:
        row: dict[str, Any] = {"routing": result.group.label, "seeds": " ".join(map(str, result.seeds))}
        for name, found in {**result.estimates, "loss_difference": result.difference}.items():
            row |= {name: found and found.mean, f"{name}_half_width": found and found.half_width}
        excludes = result.difference.excludes_zero if result.difference else None
        pairs = result.difference.count if result.difference else None
        rows.append(row | {"pairs": pairs, "excludes_zero": None if excludes is None else str(excludes).lower()})
    return csv_table(rows)


def figure(results: Sequence[GroupResult], baseline: Group | None) -> bytes:
    """Draw each group's validation loss, its seeds and its interval, and the differences to the baseline; a PNG."""
    panels = 1 if baseline is None else 2
    labels = [wrapped(result.group.label) for result in results]
    row = max(0.42, 0.2 * max(label.count("\n") + 1 for label in labels))  # inches
    drawing, [axes] = grid(1, panels, 4.2 + 2.2 / panels, row * len(results) + 1.1, sharey=True)
    positions = list(range(len(results)))[::-1]
    for position, result in zip(positions, results, strict=True):
        seeds = list(result.group.values("loss").values())
        axes[0].plot(seeds, [position] * len(seeds), "o", color=COLORS[4], markersize=4, zorder=2)
        _interval(axes[0], position, result.estimates["loss"])
        if baseline is not None:
            _interval(axes[1], position, result.difference)
    axes[0].set_yticks(positions, labels)
    axes[0].set_ylim(-0.6, len(results) - 0.4)
    axes[0].set_xlabel("validation loss (nats per token)")
    if baseline is not None:
        axes[1].axvline(0, color=GREY, linewidth=1, linestyle="--")
        axes[1].set_xlabel(wrapped(f"difference to {baseline.label}, same seed", 48))
    for one in axes:
        one.grid(axis="x", color="0.9")
        one.spines[["top", "right"]].set_visible(False)
    drawing.suptitle("Mean over seeds with its 95% interval; small dots: single runs", fontsize=10)
    return png(drawing)


def _interval(axes: Any, position: int, found: Estimate | None) -> None:
    if found is not None:
        width = found.half_width or 0.0
        axes.errorbar(found.mean, position, xerr=width, fmt="D", color=COLORS[0], markersize=5, capsize=3, zorder=3)


def headings(metrics: Sequence[MetricInfo]) -> list[str]:
    """Return the titles of the metrics' columns."""
    return [metric.heading or metric.title for metric in metrics]


def estimate_cells(result: GroupResult, metrics: Sequence[MetricInfo]) -> list[str]:
    """Return a group's cells in the metrics' columns."""
    return [cell(result.estimates[metric.name], metric.format, metric.scale) for metric in metrics]


def cell(found: Estimate | None, form: str, scale: float = 1) -> str:
    """Return mean ± half width, both divided by ``scale`` and in the number format ``form``."""
    if found is None:
        return "–"
    width = "" if not found.half_width else f" ± {found.half_width / scale:{form.lstrip('+')}}"
    return f"{found.mean / scale:{form}}{width}"


def difference_cells(difference: Estimate | None) -> list[str]:
    """Return the difference to the baseline, and whether its interval excludes 0."""
    if difference is None:
        return ["no common seed", ""]
    if difference.half_width is None:
        return [f"{difference.mean:+.4f} (1 pair)", "unknown: one common seed"]
    width = f"± {difference.half_width:.4f} ({difference.count} pairs)"
    return [f"{difference.mean:+.4f} {width}", "yes" if difference.excludes_zero else "no"]
