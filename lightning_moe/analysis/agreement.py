"""The report's section on routing consistency between checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from lightning_moe.analysis.consistency import Consistency
from lightning_moe.analysis.section import Row, Section
from lightning_moe.report.figures import GREY, grid, layer_ticks, line_style, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LINES = 12
COLUMNS = {
    "weighted_jaccard": "weighted Jaccard",
    "chance_jaccard": "the same by chance",
    "weighted_dice": "weighted Dice",
    "jaccard": "token Jaccard",
    "dice": "token Dice",
    "jsd": "JSD / bits",
    "tv": "TV",
}

TEXT = """\
<p>How far two checkpoints route the same text alike. Pooled: A and B are the sets of (layer, token, expert) edges;
per token: its edges in all layers jointly, averaged over tokens. 1 is identical for Jaccard and Dice, 0 for
Jensen–Shannon divergence and total variation. Two runs with different seeds number their experts differently, so
expect little more than chance (the value that independent routers with the same loads would have); checkpoints of
one run, and the same weights under another rule, can agree.</p>
<p><code>weighted Jaccard = |A∩B| / |A∪B|</code>; <code>Dice = 2|A∩B| / (|A|+|B|)</code>; JSD (base 2) and <code>TV
= ½ Σ|p−q|</code> of the uniform distributions over a token's active experts. Conventions: both empty → Jaccard =
Dice = 1, JSD = TV = 0; one empty → Jaccard = Dice = 0, JSD = TV = 1.</p>"""


def section(pairs: Mapping[tuple[str, str], Consistency], labels: Sequence[str], layers: Sequence[str]) -> Section:
    """Make the section of the report, for all pairs of checkpoints.

    Args:
        pairs: sums of two checkpoints, by their labels; empty with a single checkpoint.
        labels: labels of the compared checkpoints.
        layers: names of the layers.
    """
    title, name = "Routing consistency between checkpoints", "consistency"
    if not pairs:
        return Section(name, title, TEXT, missing=("It needs two checkpoints with experts: give --ckpt_path again.",))
    rows: list[Row] = []
    summary: list[Row] = []
    for (first, second), consistency in pairs.items():
        per_layer, joint = consistency.result()
        for layer, agreement in zip([*layers, "all"], [*per_layer, joint], strict=True):
            rows.append({"first": first, "second": second, "layer": layer, **asdict(agreement)})
        values = asdict(joint)
        summary.append({"pair": f"{first} – {second}", **{COLUMNS[key]: values[key] for key in COLUMNS}})
    figure = _figure(pairs, labels, layers)
    return Section(name, title, TEXT, {name: rows}, {name: figure}, summary=summary)


def _figure(pairs: Mapping[tuple[str, str], Consistency], labels: Sequence[str], layers: Sequence[str]) -> Figure:
    import numpy as np

    size = max(3.2, 0.75 * len(labels) + 1.6)
    figure, [[left, right]] = grid(1, 2, max(size, 4.4), size)
    matrix = np.eye(len(labels))
    for (first, second), consistency in pairs.items():
        i, j = labels.index(first), labels.index(second)
        matrix[i, j] = matrix[j, i] = consistency.result()[1].weighted_jaccard
    left.imshow(matrix, cmap="cividis", vmin=0, vmax=1)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            color = "black" if value > 0.55 else "white"
            left.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=9)
    names = [wrapped(label, 18) for label in labels]
    left.set_xticks(range(len(labels)), names, rotation=35, ha="right", fontsize=8)
    left.set_yticks(range(len(labels)), names, fontsize=8)
    left.set_title("weighted Jaccard, all layers (1: identical)")

    at = range(len(layers))
    for index, ((first, second), consistency) in enumerate(list(pairs.items())[:MOST_LINES]):
        per_layer, _ = consistency.result()
        style = line_style(index)
        right.plot(
            at, [a.weighted_jaccard for a in per_layer], marker="o", markersize=4, label=f"{first} – {second}", **style
        )
    chance = [[a.chance_jaccard for a in consistency.result()[0]] for consistency in pairs.values()]
    right.plot(at, np.mean(chance, axis=0), color=GREY, linestyle=":", linewidth=2, label="by chance (mean)")
    layer_ticks(right.xaxis, layers, most=12)
    right.set_xlabel("layer")
    right.set_ylabel("weighted Jaccard")
    right.set_ylim(bottom=0)
    right.set_title("by layer" + (f" (the first {MOST_LINES} pairs)" if len(pairs) > MOST_LINES else ""))
    right.legend(fontsize=7, handlelength=4, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure
