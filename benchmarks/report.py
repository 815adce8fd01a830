"""The results: a table, a JSON file that describes the machine too, and a figure."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.measurement import Measurement
from benchmarks.setup import Row, Setup
from benchmarks.transformers_models import transformers_version
from lightning_moe.report.figures import COLORS
from lightning_moe.report.tables import text_table
from lightning_moe.tracking.provenance import provenance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def table(rows: Sequence[Row]) -> str:
    """Return a line per case: ratio to the first case of its comparison, quartiles of the ratio, the number itself."""
    cells = text_table([_cells(row) for row in rows], right=(1, 2, 3), indent="  ").splitlines()
    groups = groupby(zip(rows, cells, strict=True), lambda pair: f"{pair[0].comparison}: {pair[0].size}")
    return "\n\n".join("\n".join([heading, *(line for _, line in group)]) for heading, group in groups)


def _cells(row: Row) -> list[str]:
    measured = row.measured
    ratio = "–" if measured.ratio is None else f"{measured.ratio:.4f}"
    spread = f"{measured.low:.4f}-{measured.high:.4f}" if measured.low != measured.high else ""
    extras = "  ".join(_extra(name, value) for name, value in row.extras.items())
    return [row.case, ratio, spread, _quantity(measured), extras]


def _quantity(measured: Measurement) -> str:
    if measured.unit == "s":
        return f"{1e3 * measured.value:.2f} ms"
    return f"{measured.value / 1e6:.2f} MB" if measured.unit == "bytes" else f"{measured.value:g} {measured.unit}"


def _extra(name: str, value: float) -> str:
    return f"MFU {value:.1%}" if name == "mfu" else f"{value:,.0f} tokens/s"


def document(rows: Sequence[Row], setups: Mapping[str, Setup]) -> dict[str, Any]:
    """Return everything as plain data; ``setups`` by the name of their preset."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "setups": {
            preset: {name: str(value) for name, value in dataclasses.asdict(setup).items()}
            for preset, setup in setups.items()
        },
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def machine() -> dict[str, Any]:
    """Return commit, versions, processor, threads, and how busy the machine was."""
    return {
        **provenance(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "transformers": transformers_version() or "not installed (or without Nemotron-H), so left out",
        "load_average": os.getloadavg()[0],
    }


def figure(rows: Sequence[Row], title: str) -> Figure:
    """Draw a panel per comparison: bars of the ratios, with whiskers from the first to the third quartile."""
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.comparison, row.size), []).append(row)
    columns = _columns(list(groups.values()))
    height = max(sum(_height(group) for group in column) for column in columns)
    drawing = Figure(figsize=(9 * len(columns), height), layout="constrained")
    drawing.suptitle(title, fontsize=9)
    parts = drawing.subfigures(1, len(columns), squeeze=False)[0]
    for part, column in zip(parts, columns, strict=True):
        empty = height - sum(_height(group) for group in column)  # so that bars are as high in all columns
        heights = [_height(group) for group in column] + [empty] * (empty > 0.1)
        axes = part.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axis in axes[len(column) :]:
            axis.set_axis_off()
        for axis, group in zip(axes, column, strict=False):
            _panel(axis, group)
        axes[len(column) - 1].set_xlabel("multiple of the panel's first case (median; whiskers: quartiles)")
    return drawing


def _columns(groups: list[list[Row]]) -> list[list[list[Row]]]:
    """Divide the panels into one column, or two of about the same height."""
    half, height = sum(map(_height, groups)) / 2, 0.0
    if len(groups) < 6:
        return [groups]
    for index, group in enumerate(groups):
        height += _height(group)
        if height >= half:
            return [groups[: index + 1], groups[index + 1 :]] if groups[index + 1 :] else [groups]
    return [groups]


def _height(group: list[Row]) -> float:
    """Return the height of a panel in inches."""
    return 0.8 + 0.3 * len(group)


def _panel(axis: Axes, group: list[Row]) -> None:
    names = [row.case for row in group]
    ratios, lows, highs = (
        [getattr(row.measured, name) or 0.0 for row in group]
        for name in ("ratio", "low", "high")  # none: no bar
    )
    whiskers = [
        [ratio - low for ratio, low in zip(ratios, lows, strict=True)],
        [high - ratio for ratio, high in zip(ratios, highs, strict=True)],
    ]
    colors = ["#999999"] + [COLORS[0]] * (len(group) - 1)
    axis.barh(names, ratios, xerr=whiskers, color=colors, ecolor="#555555", capsize=3)
    axis.axvline(1, color="black", linewidth=0.8)
    for index, row in enumerate(group):
        ratio = "–" if row.measured.ratio is None else f"{row.measured.ratio:.3g}"
        axis.annotate(
            f"{ratio}  ({_quantity(row.measured)})", (highs[index], index), xytext=(8, 0), textcoords="offset points",
            va="center", fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * max(highs) or 1)
    axis.set_title(f"{group[0].comparison}: {group[0].size}", loc="left")
    axis.spines[["top", "right"]].set_visible(False)
