"""What ``bench`` writes: a table, a JSON file with the machine in it, and a figure."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from lightning_moe.bench.cases import Row, Setup
from lightning_moe.tracking.provenance import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def table(rows: Sequence[Row]) -> str:
    """One line per case: ratio to the first case of its comparison, quartiles of the ratio, time."""
    lines: list[str] = []
    heading = None
    width = max(len(row.case) for row in rows)
    for row in rows:
        if (row.comparison, row.size) != heading:
            heading = (row.comparison, row.size)
            lines += ["", f"{row.comparison}: {row.size}"]
        timing = row.timing
        spread = f"{timing.low:.4f}-{timing.high:.4f}"
        lines.append(f"  {row.case:<{width}}  {timing.ratio:>8.4f}  {spread:>15}  {1e3 * timing.seconds:>10.2f} ms")
    return "\n".join(lines[1:])


def document(rows: Sequence[Row], setup: Setup) -> dict[str, Any]:
    """Everything as plain data."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "setup": {name: str(value) for name, value in dataclasses.asdict(setup).items()},
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def machine() -> dict[str, Any]:
    """Commit, versions, processor, threads, and how busy the machine was."""
    return {
        **provenance(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
    }


def figure(rows: Sequence[Row]) -> Figure:
    """One panel per comparison: bars of the ratios, whiskers from the first to the third quartile."""
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.comparison, row.size), []).append(row)
    heights = [len(group) for group in groups.values()]
    drawing = Figure(figsize=(9, 1.0 * len(groups) + 0.33 * sum(heights)), layout="constrained")
    axes = drawing.subplots(len(groups), 1, squeeze=False, height_ratios=[height + 1 for height in heights])[:, 0]
    for axis, ((comparison, size), group) in zip(axes, groups.items(), strict=True):
        names = [row.case for row in group]
        ratios = [row.timing.ratio for row in group]
        whiskers = [
            [row.timing.ratio - row.timing.low for row in group],
            [row.timing.high - row.timing.ratio for row in group],
        ]
        axis.barh(names, ratios, xerr=whiskers, color="#0072B2", ecolor="#555555", capsize=3)
        axis.axvline(1, color="black", linewidth=0.8)
        for index, row in enumerate(group):
            text = f" {row.timing.ratio:.3g}"
            axis.text(row.timing.high, index, text, va="center", fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.15 * max(row.timing.high for row in group))
        axis.set_title(f"{comparison}: {size}", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("time, as a multiple of the panel's first case (median; whiskers: quartiles)", fontsize=8)
    return drawing
