"""The page of `dial`: a figure, a table, and all numbers as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_moe.dial.measure import Point
from lightning_moe.dial.methods import METHODS, TOP_K
from lightning_moe.report.figures import COLORS, GREY, grid, line_style, png
from lightning_moe.report.tables import csv_table, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE_FILE, NUMBERS_FILE, FIGURE_FILE = "dial.md", "dial.csv", "dial.png"
HEAD = (
    "asked for", "method", "experts per token", "loss", "− top-k", "standard error", "busiest expert / mean", "p"
)  # fmt: skip
NEAR_ZERO = 0.02  # nats: up to here the axis of differences is linear
TEXT = """\
The same model with other choices of experts; nothing was trained. The parameters of all methods were set on one half of
the text so that a token gets the asked number of experts on average in every MoE layer. Losses (nats per token),
experts per token and loads are from the other half. "− top-k" is the mean difference to top-k with the same number of
experts on the same windows, with its standard error over the windows.

* top-k: the model's own choice with another k, for all tokens.
* top-p: the smallest set of experts whose probabilities reach p; one p per layer.
* min-p: the experts with at least p times the probability of the token's best one; one p per layer.
* thresholds: the experts whose score exceeds the expert's threshold; each expert gets as many tokens as from top-k with
  the same number of experts.
* balanced thresholds: the same with equally many tokens for all experts.
"""


def write_page(folder: Path, title: str, facts: Sequence[str], points: Sequence[Point]) -> None:
    """Write the page into an existing folder.

    Args:
        folder: folder to write into.
        title: heading.
        facts: lines under it.
        points: what was measured.
    """
    table = markdown_table([HEAD, *map(cells, points)])
    page = "\n\n".join(
        [f"# {title}", "\n".join(facts), f"![loss against experts per token]({FIGURE_FILE})", table, TEXT]
    )
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")
    (folder / NUMBERS_FILE).write_text(csv_table([_row(point) for point in points]), encoding="utf-8")
    (folder / FIGURE_FILE).write_bytes(_figure(points))


def cells(point: Point) -> tuple[str, ...]:
    """Return a row of the table under `HEAD`."""
    difference, error = ("", "")
    if point.over_top_k is not None and point.method != TOP_K:
        difference, error = f"{point.over_top_k[0]:+.4f}", f"{point.over_top_k[1]:.4f}"
    p = "" if not point.p else f"{min(point.p):.3g} to {max(point.p):.3g}" if len(point.p) > 1 else f"{point.p[0]:.3g}"
    name = f"{point.method} (as released)" if point.released else point.method
    measured, loss = f"{point.num_experts_per_token:.3f}", f"{point.measured.loss:.4f}"
    return f"{point.target:g}", name, measured, loss, difference, error, f"{point.busiest:.2f}", p


def _row(point: Point) -> dict[str, object]:
    return {
        "method": point.method,
        "asked_num_experts_per_token": point.target,
        "num_experts_per_token": point.num_experts_per_token,
        "released": point.released,
        "loss": point.measured.loss,
        "loss_minus_top_k": None if point.over_top_k is None else point.over_top_k[0],
        "standard_error": None if point.over_top_k is None else point.over_top_k[1],
        "busiest_expert_over_mean": point.busiest,
        "num_tokens": point.measured.num_tokens,
        "num_windows": len(point.measured.window_losses),
        **{f"p_layer_{index:02d}": p for index, p in enumerate(point.p)},
        **{f"num_experts_per_token_layer_{i:02d}": f * point.target for i, f in enumerate(point.measured.fanout)},
    }


def _figure(points: Sequence[Point]) -> bytes:
    figure, [[left, right]] = grid(1, 2, 4.6, 3.4)
    for index, method in enumerate(METHODS):
        mine = [point for point in points if point.method == method]
        style = line_style(index)
        x, y = [point.num_experts_per_token for point in mine], [point.measured.loss for point in mine]
        left.plot(x, y, marker="o", markersize=3.5, label=method, **style)
        compared = [(point.target, *point.over_top_k) for point in mine if point.over_top_k is not None]
        if method != TOP_K and compared:
            # side by side, so that the bars can be told apart
            shifted = [target * (1 + 0.015 * (index - 2)) for target, _, _ in compared]
            differences, bars = [row[1] for row in compared], [2 * row[2] for row in compared]
            right.errorbar(shifted, differences, bars, marker="o", markersize=3.5, capsize=2.5, label=method, **style)
    _mark_released(left, points)
    right.axhline(0, color=GREY, linestyle=":", linewidth=1.2, label="top-k")
    right.set_yscale("symlog", linthresh=NEAR_ZERO)
    right.axhspan(-NEAR_ZERO, NEAR_ZERO, color="0.95", zorder=0)
    left.set_ylabel("loss / nats per token")
    right.set_ylabel("loss − loss of top-k (bars: 2 standard errors;\nlinear where grey, logarithmic beyond)")
    for axis in (left, right):
        axis.set_xlabel("mean experts per token")
        axis.set_xscale("log", base=2)
        targets = sorted({point.target for point in points})
        axis.set_xticks(targets, [f"{target:g}" for target in targets])
        axis.minorticks_off()
        axis.legend(fontsize=7)
    return png(figure)


def _mark_released(axis: Axes, points: Sequence[Point]) -> None:
    for point in points:
        if point.released:
            place = [point.num_experts_per_token], [point.measured.loss]
            axis.plot(*place, "o", color=COLORS[0], markersize=9, fillstyle="none", label="as released")
            axis.axhline(point.measured.loss, color=GREY, linestyle=":", linewidth=1)
