"""What a run's own record says of its training: train–eval gap, usage, warm-up, capacity (Figs. 3, 7, 10, 13)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moe.analysis.section import Row, Section
from lightning_moe.filenames import METRICS_FILE
from lightning_moe.metrics.catalogue import CATALOGUE
from lightning_moe.report.axes import share_limits
from lightning_moe.report.figures import (
    GREY,
    MARKERS,
    grid,
    layer_colors,
    layer_legend,
    line_style,
    panel_grid,
    shared_legend,
    wrapped,
)
from lightning_moe.routing import Phase
from lightning_moe.tracking.files import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHING = 8  # the train loss is averaged over one part in so many of the run's logged values

GAP_TEXT = """\
<p>Training loss (running mean of the logged values, each a mean over one batch) beside the loss on the validation
text, which is always routed causally. Validation text is new text, so some gap is normal; what counts is how it
differs between routing rules. The table takes text out of it: the same checkpoint on the same full batches of the
analysed text, once routed as in training (expert choice sees the whole batch, capacity acts) and once causally. That
difference is what routing alone costs at inference; it is zero for token choice and small for thresholds.</p>
<p><code>gap(step) = val loss − mean train loss up to the step</code>, nats per token.</p>"""

USAGE_TEXT = """\
<p>The same trade-off over training: how far the last batch's cutoff was from the stored threshold (mean over
experts, worst layer), and how uneven the experts' loads were (coefficient of variation over experts, worst layer).
Expert choice keeps the load even and lets the cutoff move; thresholds the other way round.</p>"""

WARMUP_TEXT = """\
<p>Thresholds are a moving average, and early logits outrun it: so training starts with expert choice (warm-up) and
switches when the average has caught up (vertical line). To look for: the cutoff's distance from the threshold falls
before the switch; <em>raw usage</em>, what the thresholds alone would select relative to the target, is near 1 at
the switch and returns to it; starvation is a passing peak; logit and gate spread grow without a jump.</p>
<p><code>raw usage = Σ_{t,i} 1{r_{t,i} &gt; c_i} / (ρ·E·N)</code>; starvation: share of the capacity's lower bound
that the thresholds left unfilled.</p>"""

CAPACITY_TEXT = """\
<p>In training a capacity bounds each expert's tokens: at most (1+C)·k, at least (1−C)·k. Saturation is the share of
selected tokens that the upper bound dropped, starvation the share of the lower bound that was left unfilled (and
was filled up with the next-best tokens). After the warm-up both should be small: the paper reports below 0.08 and
0.03. Lines are layers, and all runs share their axes. Nothing of this acts at inference.</p>"""


@dataclass(frozen=True)
class TrainingRecord:
    """The logged metrics of a run.

    Args:
        series: optimizer steps (from 1) and values of each metric.
        layers: names of the MoE layers.
        target: routed experts per token of each layer.
        switched_at_step: end of the warm-up; `None` before it, and for rules without a warm-up.
    """

    series: Mapping[str, tuple[list[int], list[float]]]
    layers: Sequence[str]
    target: Sequence[float]
    switched_at_step: int | None

    @classmethod
    def read(
        cls, run_dir: Path, layers: Sequence[str], target: Sequence[float], switched: int | None
    ) -> TrainingRecord:
        """Read ``metrics.jsonl`` of a run's folder (whose step is the number of steps before the logged one)."""
        series: dict[str, tuple[list[int], list[float]]] = {}
        for line in read_metrics(run_dir):
            for name, value in line.items():
                if name not in ("step", "time"):
                    steps, values = series.setdefault(name, ([], []))
                    steps.append(int(line["step"]) + 1)
                    values.append(float(value))
        return cls(series, layers, target, switched)

    def relative(self, name: str, layer: int | None = None) -> tuple[list[int], list[float]] | None:
        """Return ``raw_fanout_mean`` relative to the target."""
        found = self.series.get(f"routing/{name}" if layer is None else f"routing/{self.layers[layer]}/{name}")
        if found is None:
            return None
        target = sum(self.target) / len(self.target) if layer is None else self.target[layer]
        return found[0], [value / target for value in found[1]]


def switch_step(checkpoint: Mapping[str, Any]) -> int | None:
    """Return the step at which a checkpoint's run left the warm-up."""
    found = checkpoint.get("callbacks", {}).get("ThresholdWarmup", {}).get("switched_at_step")
    return None if found is None else int(found)


def training_phase(checkpoint: Mapping[str, Any]) -> Phase:
    """Return the phase of training at the checkpoint's step: WARMUP before the switch; TRAIN after it, or if unknown.

    Rules without a warm-up route alike in both phases.
    """
    warmup = checkpoint.get("callbacks", {}).get("ThresholdWarmup")
    return Phase.WARMUP if warmup is not None and warmup.get("switched_at_step") is None else Phase.TRAIN


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and up to ``window`` − 1 values before it."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    starts = [max(0, end - window) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]


def gap_section(records: Mapping[str, TrainingRecord], routing_gap: Sequence[Row], missing: Sequence[str]) -> Section:
    """Make the section on the train–eval gap.

    Args:
        records: record of each run.
        routing_gap: loss of each checkpoint on the analysed text, under training and under causal routing.
        missing: notes on what is known to be missing.
    """
    rows: list[Row] = []
    notes = list(missing)
    shown = {}
    for run, record in records.items():
        if "train/loss" in record.series and "val/loss" in record.series:
            shown[run] = record
            columns = zip(*_gap(record), strict=True)
            rows += [
                {"run": run, "step": step, "train_loss": train, "val_loss": val, "gap": gap}
                for step, train, val, gap in columns
            ]
        else:
            notes.append(f"{run}: {METRICS_FILE} has no train/loss and val/loss.")
    figures: dict[str, Figure] = {}
    if shown:
        figure, [[left, right]] = grid(1, 2, 4.4, 3.0)
        for index, (run, record) in enumerate(shown.items()):
            style = line_style(index)
            steps, values = record.series["train/loss"]
            left.plot(steps, smoothed(values, _window(values)), linewidth=1.2, **style)
            marker: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "markersize": 6, "fillstyle": "none"}
            left.plot(*record.series["val/loss"], color=style["color"], linestyle="", **marker)
            right.plot(*_gap(record)[::3], label=run, **marker, **style)
        left.set_ylabel("loss / nats per token")
        said = share_limits([right], "y")
        right.set_ylabel("validation − train\n/ nats per token" + said)
        right.axhline(0, color=GREY, linewidth=0.8)  # not shown by a zoomed axis
        left.plot([], [], color=GREY, label="train, running mean")
        left.plot([], [], "o", color=GREY, markersize=6, fillstyle="none", label="validation")
        for axis in (left, right):
            axis.set_xlabel("optimizer step")
            axis.set_xlim(left=0)
            axis.legend(fontsize=7)
        figures["train_eval_gap"] = figure
    tables = {"train_eval_gap": rows, "routing_gap": routing_gap}
    return Section(
        "train_eval_gap",
        "Train–eval gap",
        GAP_TEXT,
        {name: table for name, table in tables.items() if table},
        figures,
        summary=routing_gap,
        missing=notes,
    )


def _window(values: Sequence[float]) -> int:
    return max(1, len(values) // SMOOTHING)


def _gap(record: TrainingRecord) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return for each validation: step, train loss (running mean up to there), validation loss, their difference."""
    steps, values = record.series["train/loss"]
    means = smoothed(values, _window(values))
    at: list[int] = []
    train: list[float] = []
    val: list[float] = []
    for step, loss in zip(*record.series["val/loss"], strict=True):
        if steps[0] <= step:
            at.append(step)
            train.append(means[bisect_right(steps, step) - 1])
            val.append(loss)
    return at, train, val, [b - a for a, b in zip(train, val, strict=True)]


@dataclass(frozen=True)
class Panel:
    """One metric over training.

    Args:
        metric: ``routing/<metric>``; the catalogue has its title.
        reference: level to mark; `None` for none.
        relative: whether the values are divided by the target fanout.
    """

    metric: str
    reference: float | None = None
    relative: bool = False

    @property
    def label(self) -> str:
        """The label of the y-axis."""
        return CATALOGUE[self.metric].label + (" / target" if self.relative else "")

    def of(self, record: TrainingRecord, layer: int | None = None) -> tuple[list[int], list[float]] | None:
        if self.relative:
            return record.relative(self.metric, layer)
        prefix = "routing/" if layer is None else f"routing/{record.layers[layer]}/"
        return record.series.get(prefix + self.metric)


RAW_USAGE = Panel("raw_fanout_mean", 1.0, relative=True)
STARVATION = Panel("starvation_rate", 0.0)
USAGE_PANELS = (Panel("cutoff_deviation", 0.0), Panel("load_cv", 0.0))
WARMUP_PANELS = (USAGE_PANELS[0], RAW_USAGE, STARVATION, Panel("logit_std"), Panel("gate_std"))
CAPACITY_PANELS = (RAW_USAGE, Panel("saturation_rate", 0.0), STARVATION)


def usage_section(records: Mapping[str, TrainingRecord], missing: Sequence[str]) -> Section:
    """Make the section on cutoff and load over training."""
    return _over_training(
        "usage_over_training", "Cutoff and usage over training", USAGE_TEXT, USAGE_PANELS, records, missing
    )


def warmup_section(records: Mapping[str, TrainingRecord], missing: Sequence[str]) -> Section:
    """Make the section on the warm-up."""
    return _over_training("warmup", "Warm-up dynamics", WARMUP_TEXT, WARMUP_PANELS, records, missing)


def _over_training(
    name: str,
    title: str,
    text: str,
    panels: Sequence[Panel],
    records: Mapping[str, TrainingRecord],
    missing: Sequence[str],
) -> Section:
    """Draw one panel per metric, with one line per run; panels without any data are left out and named."""
    notes = list(missing)
    drawn = [panel for panel in panels if any(panel.of(record) for record in records.values())]
    for run, record in records.items():
        absent = [panel.metric for panel in panels if panel.of(record) is None]
        if absent:
            notes.append(f"{run}: not in {METRICS_FILE}: {', '.join(absent)}.")
    if not drawn:
        return Section(name, title, text, missing=notes)
    rows: list[Row] = []
    figure, axes = panel_grid(len(drawn), 3, 3.3, 2.3)
    for axis, panel in zip(axes, drawn, strict=True):
        for index, (run, record) in enumerate(records.items()):
            found = panel.of(record)
            if found is None:
                continue
            axis.plot(*found, label=run, linewidth=1.3, **line_style(index))
            if record.switched_at_step is not None:
                axis.axvline(record.switched_at_step, color=line_style(index)["color"], linestyle=":", linewidth=1)
            rows += [
                {"run": run, "metric": panel.metric + ("_relative" if panel.relative else ""), "step": s, "value": v}
                for s, v in zip(*found, strict=True)
            ]
        _finish(axis, panel, _last_step(records))
    if any(record.switched_at_step is not None for record in records.values()):
        axes[-1].plot([], [], color=GREY, linestyle=":", label="end of warm-up")
    shared_legend(figure)
    return Section(name, title, text, {name: rows}, {name: figure}, missing=notes)


def _last_step(records: Mapping[str, TrainingRecord]) -> int:
    return max(steps[-1] for record in records.values() for steps, _ in record.series.values())


def _finish(axis: Axes, panel: Panel, last_step: int) -> None:
    axis.set_xlabel("optimizer step")
    axis.set_xlim(0, last_step)
    axis.set_ylabel(panel.label)
    if panel.reference is not None:
        axis.axhline(panel.reference, color=GREY, linestyle=":", linewidth=1)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))


def capacity_section(records: Mapping[str, TrainingRecord], missing: Sequence[str]) -> Section:
    """Make the section on what the capacity did, layer by layer, for the runs in which it acted."""
    name, title = "capacity", "Capacity in training"
    acted = {run: record for run, record in records.items() if "routing/saturation_rate" in record.series}
    notes = [*missing, *(f"{run}: no capacity acted in the recorded steps." for run in records if run not in acted)]
    if not acted:
        return Section(name, title, CAPACITY_TEXT, missing=notes)
    rows: list[Row] = []
    summary: list[Row] = []
    figure, axes = grid(len(acted), len(CAPACITY_PANELS), 3.2, 2.2)
    for line, (run, record) in zip(axes, acted.items(), strict=True):
        colors = layer_colors(len(record.layers))
        last: dict[str, str | float | None] = {"run": run}
        for axis, panel in zip(line, CAPACITY_PANELS, strict=True):
            for layer, color in enumerate(colors):
                found = panel.of(record, layer)
                if found is None:
                    continue
                axis.plot(*found, color=color, linewidth=1.2)
                metric = panel.metric + ("_relative" if panel.relative else "")
                rows += [
                    {"run": run, "layer": record.layers[layer], "metric": metric, "step": step, "value": value}
                    for step, value in zip(*found, strict=True)
                ]
            overall = panel.of(record)
            if overall is not None:
                last[f"{panel.label}, last fifth"] = _tail_mean(overall[1])
            if record.switched_at_step is not None:
                axis.axvline(record.switched_at_step, color=GREY, linestyle="--", linewidth=1)
            _finish(axis, panel, _last_step(acted))
        line[0].set_title(wrapped(run, 44), loc="left")
        switch = ("end of warm-up", {"color": GREY, "linestyle": "--"})
        layer_legend(line[-1], record.layers, colors, [switch] if record.switched_at_step is not None else [])
        summary.append(last)
    for column, panel in zip(zip(*axes, strict=True), CAPACITY_PANELS, strict=True):
        said = share_limits(column, "y")
        for axis in column:
            axis.set_ylabel(panel.label + said)
    return Section(name, title, CAPACITY_TEXT, {name: rows}, {name: figure}, summary=summary, missing=notes)


def _tail_mean(values: Sequence[float]) -> float:
    tail = values[-max(1, len(values) // 5) :]
    return sum(tail) / len(tail)
