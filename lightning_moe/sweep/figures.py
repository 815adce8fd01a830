"""The figures of a sweep: its history, values over parameters, pairs of parameters, importances, the Pareto front.

Only complete trials have a value. Pruned and failed ones are marks in a grey band at the edge where bad values are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lightning_moe.report.figures import COLORS, GREY, grid, png, shared_legend, wrapped_key
from lightning_moe.sweep.objective import BEST, COMPLETE, Objective
from lightning_moe.sweep.pairs import pairs
from lightning_moe.sweep.scales import STRIP, Scale, by_importance
from lightning_moe.sweep.spec import Sweep
from lightning_moe.sweep.trials import best_trials, best_value, ended_trials, importances

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna import Study
    from optuna.trial import FrozenTrial

PANELS, COLUMNS = 9, 3  # of a page of parameters
MOST_BARS = 20
MOST_PAIRS = 6  # of objectives
MOST_NUMBERED = 12  # trials of a front whose numbers are written beside them


def figures(sweep: Sweep, optuna_study: Study) -> Iterator[tuple[str, bytes]]:
    """Draw every figure that the trials so far allow.

    Yields:
        Name of the figure, and its PNG.
    """
    trials = ended_trials(optuna_study)
    if not trials:
        return
    objectives = [
        Objective(index, name, direction, len(sweep.seeds), trials)
        for index, (name, direction) in enumerate(sweep.objectives.items())
    ]
    best = best_trials(sweep, optuna_study)
    for objective in objectives:
        suffix = "" if len(objectives) == 1 else "_" + objective.name.replace("/", "_")
        shares = importances(optuna_study, objective.index)
        if objective.near:
            yield f"history{suffix}", png(history(sweep, objective))
        for number, page in enumerate(parameter_pages(sweep, objective, shares, best), 1):
            yield f"parameters{suffix}{f'_{number}' if number > 1 else ''}", png(page)
        if (figure := pairs(sweep, objective, shares, best)) is not None:
            yield f"pairs{suffix}", png(figure)
        if len(shares) > 1:
            yield f"importance{suffix}", png(importance(sweep, objective, shares))
    if len(objectives) > 1 and best:
        yield "pareto_front", png(pareto_front(sweep, objectives, best))


def history(sweep: Sweep, objective: Objective) -> Figure:
    """Draw the value of each trial in the order of their ends, and the best so far as steps."""
    from matplotlib.ticker import MaxNLocator

    figure, [[axes]] = grid(1, 1, 6.4, 3.6)
    place = {trial.number: index for index, trial in enumerate(objective.trials, 1)}
    steps = best_so_far(objective)
    near = [(x, y) for x, y in steps if objective.fence is None or objective.sign * (y - objective.fence) <= 0]
    end = [(len(objective.trials), near[-1][1])]
    axes.step(*zip(*near, *end, strict=True), where="post", color=GREY, linewidth=1.4, label="best so far", zorder=1)
    best = best_value([y for _, y in steps], objective.direction)
    first = next(trial for trial in objective.complete if objective.value(trial) == best)
    _draw_trials(axes, objective, lambda trial: place[trial.number], [first])
    axes.set_xlim(0.5, len(objective.trials) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axes.set_xlabel("trials that have ended")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    shared_legend(figure, below=True)
    figure.suptitle(f"Sweep {sweep.name}: {objective.name} of each trial, and the best so far", fontsize=10)
    return figure


def best_so_far(objective: Objective) -> list[tuple[int, float]]:
    """Return, for each complete trial, the count of trials that have ended by then and the best value of them."""
    found: list[tuple[int, float]] = []
    for count, trial in enumerate(objective.trials, 1):
        if trial.state.name == "COMPLETE":
            before = [found[-1][1]] if found else []
            found.append((count, best_value([*before, objective.value(trial)], objective.direction)))
    return found


def parameter_pages(
    sweep: Sweep, objective: Objective, shares: dict[str, float], best: Sequence[FrozenTrial]
) -> Iterator[Figure]:
    """Draw the value over each parameter, the most important first, ``PANELS`` parameters on a page.

    Args:
        sweep: sweep of the trials.
        objective: objective on the y-axis.
        shares: importances, see `importances`; parameters without one come last, in the order of the file.
        best: trials to mark.
    """
    scales = by_importance(sweep, shares)
    pages = [scales[start : start + PANELS] for start in range(0, len(scales), PANELS)]
    for number, page in enumerate(pages, 1):
        columns = 2 if len(page) == 4 else min(COLUMNS, len(page))
        figure, rows = grid(-(-len(page) // columns), columns, 3.3 if columns > 1 else 5.0, 2.9, sharey=True)
        panels = [axes for row in rows for axes in row]
        for axes, scale in zip(panels, page, strict=False):
            _draw_parameter(axes, objective, scale, best)
        for unused in panels[len(page) :]:
            unused.set_visible(False)
        for row in rows:
            for axes in row[1:]:
                axes.set_ylabel("")
        shared_legend(figure, below=True)
        title = f"Sweep {sweep.name}: {objective.name} over each parameter"
        if len(pages) > 1:
            title += f"; page {number} of {len(pages)}, the most important of {len(scales)} parameters first"
        figure.suptitle(title, fontsize=10)
        yield figure


def _draw_parameter(axes: Axes, objective: Objective, scale: Scale, best: Sequence[FrozenTrial]) -> None:
    """Draw one parameter. A trial of a choice is beside its tick, the earlier the further left, so that all show."""
    key, count = scale.parameter.key, len(objective.trials)
    aside = {trial.number: STRIP * (2 * i / max(1, count - 1) - 1) for i, trial in enumerate(objective.trials)}

    def place(trial: FrozenTrial) -> float | None:
        if key not in trial.params:
            return None
        return scale.position(trial.params[key]) + (0.0 if scale.choices is None else aside[trial.number])

    _draw_trials(axes, objective, place, best)
    scale.draw(axes.xaxis, 0.05 if scale.choices is None else 0.5)
    if not any(key in trial.params for trial in objective.trials):
        axes.text(0.5, 0.5, "no trial has it", transform=axes.transAxes, ha="center", fontsize=8, color=GREY)
    axes.grid(color="0.9", axis="y" if scale.choices is not None else "both")
    axes.set_axisbelow(True)


def _draw_trials(
    axes: Axes,
    objective: Objective,
    place: Callable[[FrozenTrial], float | None],
    best: Sequence[FrozenTrial],
) -> None:
    """Draw trials as points of the values' axis, and those without a value in its band.

    Args:
        axes: axes to draw on.
        objective: objective of the y-axis.
        place: function that returns a trial's place on the x-axis; `None` for a trial that is not drawn.
        best: trials to mark.
    """
    heights = objective.draw_axis(axes)

    def scatter(trials: Sequence[FrozenTrial], label: str, style: dict[str, Any], height: float | None = None) -> None:
        if not (drawn := [(x, trial) for trial in trials if (x := place(trial)) is not None]):
            return
        transform: dict[str, Any] = {} if height is None else {"transform": axes.get_xaxis_transform()}
        y = [objective.drawn_value(trial) if height is None else height for _, trial in drawn]
        axes.scatter([x for x, _ in drawn], y, label=label, **{"zorder": 3} | style, **transform)

    is_best = {trial.number for trial in best}
    scatter([trial for trial in objective.near if trial.number not in is_best], "complete", COMPLETE)
    for (label, style, trials), height in zip(objective.marked, heights, strict=True):
        scatter(trials, label, style, height)
    shown = [trial for trial in best if not objective.is_far(trial)]
    if shown:
        scatter(shown, f"best: trial {shown[0].number}" if len(best) == 1 else "Pareto front", BEST)


def importance(sweep: Sweep, objective: Objective, shares: dict[str, float]) -> Figure:
    """Draw the share of the objective's variance that each parameter explains."""
    shown = list(shares.items())[:MOST_BARS]
    names = [wrapped_key(key, 40) for key, _ in shown]
    height = sum(0.12 + 0.16 * (1 + name.count("\n")) for name in names)
    figure, [[axes]] = grid(1, 1, 6.4, height + 1.0)
    bars = axes.barh(names, [share for _, share in shown], color=COLORS[0], height=0.6)
    axes.bar_label(bars, [f"{share:.0%}" if share >= 0.005 else "<1%" for _, share in shown], padding=3, fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)  # the largest on top
    axes.set_xlim(0, 1.1 * max(share for _, share in shown) or 1)
    axes.set_xlabel(f"share of the variance of {objective.name} (fANOVA, {len(objective.complete)} trials)")
    axes.spines[["top", "right"]].set_visible(False)
    notes = [f"the {MOST_BARS} largest of {len(shares)}"] if len(shares) > MOST_BARS else []
    absent = [p.key.rpartition(".")[2] for p in sweep.space.parameters if p.key not in shares]
    notes += [wrapped_key(f"not shown: {', '.join(absent)}, which not all trials have", 70)] if absent else []
    title = "\n".join([f"Sweep {sweep.name}: which parameters matter for {objective.name}", *notes])
    figure.suptitle(title, fontsize=10)
    return figure


def pareto_front(sweep: Sweep, objectives: Sequence[Objective], front: Sequence[FrozenTrial]) -> Figure:
    """Draw the trials over each two objectives, with the front of all objectives marked."""
    every = list(combinations(objectives, 2))
    couples = every[:MOST_PAIRS]
    columns = min(COLUMNS, len(couples))
    figure, rows = grid(-(-len(couples) // columns), columns, 3.8 if columns > 1 else 6.0, 3.6)
    on_front = {trial.number for trial in front}
    for axes, (x, y) in zip((axes for row in rows for axes in row), couples, strict=False):
        others = [trial for trial in x.complete if trial.number not in on_front]
        axes.scatter([x.value(t) for t in others], [y.value(t) for t in others], label="complete", **COMPLETE)
        axes.scatter([x.value(t) for t in front], [y.value(t) for t in front], label="Pareto front", **BEST)
        for trial in front if len(front) <= MOST_NUMBERED else []:
            axes.annotate(str(trial.number), (x.value(trial), y.value(trial)), (6, 5), fontsize=7,
                          textcoords="offset points", zorder=6)  # fmt: skip
        axes.margins(0.1)
        for objective, ruler in ((x, axes.xaxis), (y, axes.yaxis)):
            ruler.set_label_text(f"{objective.label}\n{objective.direction}")
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    shared_legend(figure, below=True)
    more = f"; {len(couples)} of {len(every)} pairs of objectives" if len(couples) < len(every) else ""
    numbers = "; numbers: trials" if len(front) <= MOST_NUMBERED else ""
    figure.suptitle(f"Sweep {sweep.name}: the Pareto front of its trials{numbers}{more}", fontsize=10)
    return figure
