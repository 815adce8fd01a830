"""One objective of a sweep, as figures show it: its trials, its axis, and values too far away for that axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lightning_moe.metrics.catalogue import CATALOGUE, parse
from lightning_moe.report.figures import COLORS, wrapped_key
from lightning_moe.sweep.results import SUMMARY_PREFIX

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from optuna.trial import FrozenTrial

COMPLETE: dict[str, Any] = {"marker": "o", "s": 22, "color": COLORS[0], "alpha": 0.8, "linewidths": 0}
BEST: dict[str, Any] = {
    "marker": "*",
    "s": 150,
    "color": COLORS[5],
    "edgecolors": "black",
    "linewidths": 0.8,
    "zorder": 5,
}
PRUNED: dict[str, Any] = {"marker": "s", "s": 16, "facecolors": "none", "edgecolors": "0.3", "linewidths": 0.9}
FAILED: dict[str, Any] = {"marker": "x", "s": 20, "color": "black", "linewidths": 1.2}
FEWEST_FOR_FENCE = 8  # trials below which no value is called far away
LONGEST = 1.5  # lengths of the axis up to the fence that it must have without the fence, for the fence to be used
MARGIN, ROW = 0.06, 0.08  # beside the values, and of one row of marks; in the length of the values


@dataclass(frozen=True)
class Objective:
    """One objective with the trials that have ended.

    Args:
        index: position among the sweep's objectives.
        name: name of the metric.
        direction: direction ``minimize`` or ``maximize``.
        seeds: number of runs whose mean is the value.
        trials: trials that are complete, pruned or failed, in the order of their ends.
    """

    index: int
    name: str
    direction: str
    seeds: int
    trials: Sequence[FrozenTrial]

    @cached_property
    def complete(self) -> list[FrozenTrial]:
        """Trials that have a value."""
        return [trial for trial in self.trials if trial.state.name == "COMPLETE"]

    @property
    def sign(self) -> int:
        """Factor that makes small values good."""
        return 1 if self.direction == "minimize" else -1

    def value(self, trial: FrozenTrial) -> float:
        """Return a complete trial's value."""
        return float(trial.values[self.index])

    @property
    def label(self) -> str:
        """Label of an axis: name, unit, and over how many seeds it is a mean."""
        found = parse(self.name)
        metric = found.metric if found else CATALOGUE.get(self.name.removeprefix(SUMMARY_PREFIX))
        lines = [wrapped_key(self.name, 34)]
        lines += [f"mean of {self.seeds} seeds"] if self.seeds > 1 else []
        if metric is not None and metric.unit:
            lines[0 if len(self.name) + len(metric.unit) < 34 else -1] += f" ({metric.unit})"
        return "\n".join(lines)

    @cached_property
    def fence(self) -> float | None:
        """Worst value that the axis shows; `None` if it shows all.

        It is Tukey's outer fence, the third quartile and three times the distance of the quartiles. It is used only
        where the axis would otherwise be more than ``LONGEST`` times as long.
        """
        bad = sorted(self.sign * self.value(trial) for trial in self.complete)
        bad = [value for value in bad if math.isfinite(value)]
        if len(bad) < FEWEST_FOR_FENCE:
            return None
        first, third = bad[len(bad) // 4], bad[3 * len(bad) // 4]
        fence = third + 3 * (third - first)
        return self.sign * fence if bad[-1] - bad[0] > LONGEST * (fence - bad[0]) else None

    def is_far(self, trial: FrozenTrial) -> bool:
        """Return whether a complete trial's value is beyond the fence, or not finite."""
        value = self.value(trial)
        return not math.isfinite(value) or (self.fence is not None and self.sign * (value - self.fence) > 0)

    @cached_property
    def near(self) -> list[FrozenTrial]:
        """Complete trials that the axis shows."""
        return [trial for trial in self.complete if not self.is_far(trial)]

    def drawn_value(self, trial: FrozenTrial) -> float:
        """Return a complete trial's value, or the worst value that the axis shows if it is far away."""
        if not self.is_far(trial):
            return self.value(trial)
        return self.sign * max(self.sign * self.value(shown) for shown in self.near)

    @property
    def marked(self) -> list[tuple[str, dict[str, Any], list[FrozenTrial]]]:
        """Label, style and trials of each kind of mark without a place on the axis of values; only kinds that exist."""
        far = [trial for trial in self.complete if self.is_far(trial)]
        finite = [math.isfinite(self.value(trial)) for trial in far]
        why = [f"worse than {self.fence:.4g}"] if any(finite) else []
        why += ["not finite"] if not all(finite) else []
        kinds = [
            (" or ".join(why), COMPLETE | {"marker": "^" if self.sign == 1 else "v"}, far),
            ("pruned", PRUNED, [trial for trial in self.trials if trial.state.name == "PRUNED"]),
            ("failed", FAILED, [trial for trial in self.trials if trial.state.name == "FAIL"]),
        ]
        return [(f"{label} ({len(trials)})", style, trials) for label, style, trials in kinds if trials]

    def draw_axis(self, axes: Axes) -> list[float]:
        """Give the y-axis limits, ticks and a label, and draw the band of the marks at the edge of bad values.

        Args:
            axes: axes whose y-axis has the values.

        Returns:
            Height of each row of `marked`, from 0 (bottom) to 1 (top); the first is the nearest to the values.
        """
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import MaxNLocator

        values = [self.value(trial) for trial in self.near] or [0.0, 1.0]
        low, high = min(values), max(values)
        length = (high - low) or max(abs(high) * 0.02, 1e-9)  # one value, or all the same
        margin = MARGIN * length if high > low else length
        low, high = low - margin, high + margin
        rows = len(self.marked)
        band = rows * ROW * (high - low)
        bottom, top = (low, high + band) if self.sign == 1 else (low - band, high)
        axes.set_ylim(bottom, top)
        ticks = [tick for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
        axes.set_yticks(ticks if self.near else [])
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_ylabel(self.label)
        share = band / (top - bottom)
        edge = 1 - share if self.sign == 1 else 0.0
        if rows:
            axes.add_patch(
                Rectangle((0, edge), 1, share, transform=axes.transAxes, color="0.93", linewidth=0, zorder=0)
            )
        places = [share * (row + 0.5) / rows for row in range(rows)]
        return [edge + place if self.sign == 1 else share - place for place in places]
