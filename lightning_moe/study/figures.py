"""The figures of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from lightning_moe.compare import report
from lightning_moe.report.figures import GREY, grid, line_style, png, shared_legend
from lightning_moe.study.results import Results
from lightning_moe.study.spec import spelled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHING = 5  # logged points in the moving average of a training curve


def figures(results: Results) -> dict[str, bytes]:
    """Draw the figures, name → PNG."""
    drawn = {"comparison": report.figure(results.rows, results.baseline), "tuning": png(_tuning(results))}
    if sum(any(curves.values()) for curves in results.curves.values()) > 1:
        drawn["training"] = png(_training(results))
    return drawn


def _tuning(results: Results) -> Figure:
    figure, [[axes]] = grid(1, 1, 6.4, 3.6)
    for index, (name, losses) in enumerate(results.tuning.items()):
        points = sorted((value, loss) for value, loss in losses.items() if math.isfinite(loss))
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **line_style(index))
        if name in results.tuned:
            axes.plot(results.tuned[name], losses[results.tuned[name]], "o", markersize=9, mfc="none", mec="0.2")
    values = results.study.tuning.values
    axes.set_xscale("log" if values[0] > 0 else "linear")
    axes.set_xticks(values, [spelled(value) for value in values])
    axes.minorticks_off()
    axes.set_xlabel(results.study.tuning.key)
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title(f"Tuning, seed {results.study.tuning.seed}; circles: the best of each method")
    axes.grid(color="0.9")
    shared_legend(figure, right=True)
    return figure


def _training(results: Results) -> Figure:
    """Draw the training loss minus the baseline's, as mean over common seeds, for the methods with own tuning."""
    figure, [[axes]] = grid(1, 1, 6.4, 3.6)
    per_step = results.example["train_tokens"] / results.example["steps"]
    reference = results.curves[results.baseline.label]
    shown = [name for name in results.curves if results.study.methods[name].is_tuned]
    for index, name in enumerate(shown):
        curve = _difference(results.curves[name], reference)
        if name == results.baseline.label or not curve:
            continue
        axes.plot([(step + 1) * per_step for step, _ in curve], [loss for _, loss in curve], label=name,
                  linewidth=1.4, **line_style(index))  # fmt: skip
    axes.axhline(0, color=GREY, linewidth=1, linestyle="--")
    axes.set_xlabel("training tokens")
    axes.set_ylabel(f"training loss − that of\n{results.baseline.label} (nats per token)")
    axes.set_title(f"Mean over seeds, moving average of {SMOOTHING} logged steps")
    axes.grid(color="0.9")
    shared_legend(figure, right=True)
    return figure


def _difference(
    curves: Mapping[int, Sequence[tuple[int, float]]], reference: Mapping[int, Sequence[tuple[int, float]]]
) -> list[tuple[int, float]]:
    by_step: dict[int, list[float]] = {}
    for seed in curves.keys() & reference.keys():
        other = dict(reference[seed])
        for step, loss in curves[seed]:
            if step in other:
                by_step.setdefault(step, []).append(loss - other[step])
    means = [(step, fmean(values)) for step, values in sorted(by_step.items())]
    return [
        (means[end - 1][0], fmean(value for _, value in means[end - SMOOTHING : end]))
        for end in range(SMOOTHING, len(means) + 1)
    ]
