"""Router saturation (Section 5.1 of OLMoE, arXiv 2409.02060): how early in training a router's choices are final."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_moe.analysis.consistency import Consistency
from lightning_moe.analysis.section import Row, Section, Value
from lightning_moe.report.figures import GREY, grid, layer_colors, layer_legend, layer_ticks, line_style, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 8

TEXT = """\
<p>The share of the last checkpoint's choices that an earlier checkpoint of the same run made too, for the same tokens.
1: the router was final then, and the experts could specialise on tokens that stay theirs. The dotted line is what
independent routers with the same loads would share. Left: over training. Right: by layer, for each earlier checkpoint.
Compare checkpoints of the end of training with care: a low learning rate also freezes the router.</p>
<p><code>saturation = Σ_t |A_t ∩ B_t| / Σ_t |B_t|</code> with the experts A_t of token t in the earlier and B_t in the
last checkpoint. With k experts for every token this is OLMoE's mean of |A_t ∩ B_t| / k.</p>"""


@dataclass(frozen=True)
class Point:
    """An earlier checkpoint of a run against the last one.

    Args:
        label: label of the earlier checkpoint; ``last`` is the other's.
        step: optimizer steps before it; ``last_step`` those before the other.
        layers: share and share by chance of each layer.
        joint: the same over all layers.
    """

    label: str
    last: str
    step: int
    last_step: int
    layers: Sequence[tuple[float, float]]
    joint: tuple[float, float]


def points(
    pairs: Mapping[tuple[str, str], Consistency], checkpoints: Mapping[str, tuple[str, int]]
) -> dict[str, list[Point]]:
    """Return run → its checkpoints before the last one, in the order of their steps.

    Args:
        pairs: sums of two checkpoints, by their labels.
        checkpoints: label → run and step, of checkpoints with experts that are in a run's folder.
    """
    found: dict[str, list[Point]] = {}
    for run in dict.fromkeys(run for run, _ in checkpoints.values()):
        steps = {label: step for label, (of, step) in checkpoints.items() if of == run}
        last = max(steps, key=lambda label: steps[label])
        earlier = sorted((step, label) for label, step in steps.items() if step < steps[last])
        mine = [_point(pairs, label, last, step, steps[last]) for step, label in earlier]
        if mine:
            found[run] = mine
    return found


def _point(pairs: Mapping[tuple[str, str], Consistency], label: str, last: str, step: int, last_step: int) -> Point:
    is_second = (label, last) in pairs  # whether the last checkpoint is the second one of the pair
    per_layer, joint = pairs[(label, last) if is_second else (last, label)].result()
    shares = [
        (a.of_second, a.chance_of_second) if is_second else (a.of_first, a.chance_of_first) for a in (*per_layer, joint)
    ]
    return Point(label, last, step, last_step, shares[:-1], shares[-1])


def section(
    pairs: Mapping[tuple[str, str], Consistency], checkpoints: Mapping[str, tuple[str, int]], layers: Sequence[str]
) -> Section:
    """Make the section of the report; the arguments are those of `points`, and the names of the layers."""
    name, title = "saturation", "Router saturation"
    found = points(pairs, checkpoints)
    if not found:
        note = "It needs an earlier checkpoint of the same run, in the run's folder: give --ckpt_path again."
        return Section(name, title, TEXT, missing=(note,))
    rows: list[Row] = []
    summary: list[Row] = []
    for run, mine in found.items():
        for point in mine:
            for layer, (share, chance) in zip([*layers, "all"], [*point.layers, point.joint], strict=True):
                where: dict[str, Value] = {
                    "run": run,
                    "checkpoint": point.label,
                    "step": point.step,
                    "last_step": point.last_step,
                }
                rows.append({**where, "layer": layer, "saturation": share, "by_chance": chance})
            lowest = min(range(len(layers)), key=lambda index: point.layers[index][0])
            summary.append(
                {
                    "checkpoint": point.label,
                    "against": point.last,
                    "saturation, all layers": point.joint[0],
                    "by chance": point.joint[1],
                    "least saturated layer": layers[lowest],
                    "its saturation": point.layers[lowest][0],
                }
            )
    return Section(name, title, TEXT, {name: rows}, {name: _figure(found, layers)}, summary=summary)


def _figure(found: Mapping[str, Sequence[Point]], layers: Sequence[str]) -> Figure:
    figure, axes = grid(len(found), 2, 4.2, 2.8)
    colors = layer_colors(len(layers))
    for (left, right), (run, mine) in zip(axes, found.items(), strict=True):
        _over_steps(left, mine, colors)
        left.set_title(wrapped(f"{run}, against step {mine[0].last_step}", 48), loc="left")
        mean: dict[str, Any] = {"color": "black", "linewidth": 2}
        chance: dict[str, Any] = {"color": GREY, "linestyle": ":"}
        layer_legend(left, layers, colors, [("all layers", mean), ("by chance", chance)])
        for index, point in enumerate(mine[-MOST_LINES:]):
            values = [share for share, _ in point.layers]
            right.plot(range(len(layers)), values, marker="o", markersize=4, label=point.label, **line_style(index))
        right.plot(range(len(layers)), [by_chance for _, by_chance in mine[-1].layers], **chance)
        layer_ticks(right.xaxis, layers, most=12)
        right.set_xlabel("layer")
        right.set_title(f"the last {MOST_LINES} of them" if len(mine) > MOST_LINES else "by layer", loc="left")
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        for axis in (left, right):
            axis.set_ylim(0, 1.03)
        left.set_ylabel("share of the last choices")
    return figure


def _over_steps(axis: Axes, mine: Sequence[Point], colors: Sequence[object]) -> None:
    steps = [point.step for point in mine]
    for layer, color in enumerate(colors):
        axis.plot(steps, [point.layers[layer][0] for point in mine], marker="o", markersize=3, color=color, linewidth=1)
    axis.plot(steps, [point.joint[0] for point in mine], marker="o", markersize=4, color="black", linewidth=2)
    axis.plot(steps, [point.joint[1] for point in mine], marker=".", color=GREY, linestyle=":")
    axis.set_xlabel("optimizer step of the earlier checkpoint")
