"""The objective over two parameters at a time: the trials, and the mean of those near by as colour between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lightning_moe.report.figures import grid, shared_legend
from lightning_moe.sweep.objective import BEST, Objective
from lightning_moe.sweep.scales import STRIP, Scale, by_importance
from lightning_moe.sweep.spec import Sweep
from lightning_moe.sweep.surface import FEWEST, kernel_mean

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna.trial import FrozenTrial

MOST_PARAMETERS = 3
FEWEST_POINTS = 3
RESOLUTION = 201  # places of the grid of colours along each axis
LEVELS = 10


def pairs(sweep: Sweep, objective: Objective, shares: dict[str, float], best: Sequence[FrozenTrial]) -> Figure | None:
    """Draw the value over each two of the most important parameters with an order.

    Args:
        sweep: sweep of the trials.
        objective: objective of the colours.
        shares: importances; parameters without one come last, in the order of the file.
        best: trials to mark.

    Returns:
        The figure; `None` if there are no two such parameters, or fewer than ``FEWEST_POINTS`` trials have both.
    """
    numeric = [scale for scale in by_importance(sweep, shares) if scale.is_numeric]
    couples = [
        pair
        for pair in combinations(numeric[:MOST_PARAMETERS], 2)
        if len(_have(objective.near, *pair)) >= FEWEST_POINTS
    ]
    if not couples:
        return None
    figure, [row] = grid(1, len(couples), 3.5 if len(couples) > 1 else 5.0, 3.5)
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator

    values = [objective.value(trial) for trial in objective.near]
    low, high = min(values), max(values)
    if low == high:  # one value has no scale of its own
        low, high = low - max(abs(low) * 0.01, 1e-9), high + max(abs(high) * 0.01, 1e-9)
    levels = MaxNLocator(LEVELS).tick_values(low, high)
    colors = colormaps["viridis" if objective.sign == 1 else "viridis_r"]
    scale = ScalarMappable(BoundaryNorm(levels, colors.N), colors)
    is_filled = [_draw_pair(axes, objective, x, y, best, scale) for axes, (x, y) in zip(row, couples, strict=True)]
    bar = figure.colorbar(scale, ax=row, label=objective.label, format="%.6g")
    bar.ax.tick_params(labelsize=8)
    shared_legend(figure, below=True)
    title = f"Sweep {sweep.name}: {objective.name} over pairs of parameters; dark is better"
    if len(numeric) > MOST_PARAMETERS:
        title += f"\nthe {MOST_PARAMETERS} most important of {len(numeric)} with an order"
    if any(is_filled):
        title += "\nbetween the trials: the mean of those near by, nearer ones weigh more; white: none is near"
    figure.suptitle(title, fontsize=10)
    return figure


def surface(objective: Objective, x: Scale, y: Scale) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Compute the colours between the trials, see `kernel_mean`.

    Values too far away for the axis count as the worst that it shows.

    Returns:
        Positions on the x-axis, float64 [places]; positions on the y-axis, the same; values, float64 [places of y,
        places of x]. `None` for fewer than ``FEWEST`` trials, or if a parameter or the value is the same in all.
    """
    import numpy as np

    trials = _have(objective.complete, x, y)
    if len(trials) < FEWEST:
        return None
    places = np.array([_position(trial, x, y) for trial in trials])
    points = np.stack([x.to_unit(places[:, 0]), y.to_unit(places[:, 1])], 1)
    values = np.array([objective.drawn_value(trial) for trial in trials])
    if np.ptp(points, 0).min() == 0 or np.ptp(values) == 0:
        return None
    unit = np.linspace(0, 1, RESOLUTION)
    across, up = np.meshgrid(unit, unit)
    mean = kernel_mean(points, values, np.stack([across.ravel(), up.ravel()], 1))
    return x.from_unit(unit), y.from_unit(unit), mean.reshape(across.shape)


def _have(trials: Sequence[FrozenTrial], x: Scale, y: Scale) -> list[FrozenTrial]:
    """Return the trials that have both parameters."""
    return [trial for trial in trials if not any(map(math.isnan, _position(trial, x, y)))]


def _position(trial: FrozenTrial, x: Scale, y: Scale) -> tuple[float, float]:
    places = [
        scale.position(trial.params[scale.parameter.key]) if scale.parameter.key in trial.params else math.nan
        for scale in (x, y)
    ]
    return places[0], places[1]


def _draw_pair(axes: Axes, objective: Objective, x: Scale, y: Scale, best: Sequence[FrozenTrial], colors: Any) -> bool:
    """Draw one pair; return whether there is colour between the trials."""
    found = surface(objective, x, y)
    if found is not None:
        axes.contourf(*found, levels=colors.norm.boundaries, cmap=colors.cmap, norm=colors.norm, zorder=1)
    count = len(objective.trials)
    aside = {trial.number: 0.5 * STRIP * (2 * i / max(1, count - 1) - 1) for i, trial in enumerate(objective.trials)}

    def scatter(trials: Sequence[FrozenTrial], label: str, style: dict[str, Any]) -> None:
        if not (drawn := _have(trials, x, y)):
            return
        places = [
            [position + (0.0 if scale.choices is None else aside[trial.number])
             for scale, position in zip((x, y), _position(trial, x, y), strict=True)]
            for trial in drawn
        ]  # fmt: skip
        if "c" in style:
            style = style | {"c": [objective.drawn_value(trial) for trial in drawn]}
        axes.scatter(
            [place[0] for place in places], [place[1] for place in places], label=label, **{"zorder": 3} | style
        )

    is_best = {trial.number for trial in best}
    filled = {"c": None, "cmap": colors.cmap, "norm": colors.norm, "s": 34, "edgecolors": "white", "linewidths": 0.8}
    scatter([trial for trial in objective.near if trial.number not in is_best], "complete", filled)
    for label, style, trials in objective.marked:
        scatter(trials, label, filled | {"marker": style["marker"]} if style["marker"] in "^v" else style)
    shown = [trial for trial in best if not objective.is_far(trial)]
    if shown:
        scatter(shown, f"best: trial {shown[0].number}" if len(best) == 1 else "Pareto front", BEST)
    for scale, ruler in ((x, axes.xaxis), (y, axes.yaxis)):
        scale.draw(ruler, 0.05 if scale.choices is None else 0.4)
    return found is not None
