"""Histograms of router logits with the thresholds (the paper's Fig. 18)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_moe.analysis.experts import by_mean
from lightning_moe.analysis.observe import Observation
from lightning_moe.analysis.section import Row, Section
from lightning_moe.report.axes import label_experts
from lightning_moe.report.figures import COLORS, panel_grid, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_BINS = 120
PANELS_IN_A_ROW = 4

TEXT = """\
<p>The distribution of each expert's router logits over the analysed tokens (one column per expert, darker is
denser), and the stored threshold (orange bar): a token goes to the expert when its logit lies above the bar. The
mass above a bar should be the target share ρ. Bars that lie far from the upper tail, columns much wider than
others, or mass piled up just below a bar are what to look for. Rules without thresholds have no bars. In each layer
experts are sorted by their mean logit; the numbers below the axis are theirs. A layer has the same axes in all
checkpoints, and all panels have the same colours.</p>
<p>Bins span the first batch's logits, widened by half their span on either side; what lies beyond is in the outer
bins.</p>"""


class RouterLogits:
    """The histograms of router logits, per layer and expert.

    Args:
        threshold: fp32 [L, E], or `None` for rules without thresholds.
    """

    def __init__(self, threshold: Tensor | None) -> None:
        self.threshold = threshold
        self.edges: Tensor | None = None  # fp64 [L, NUM_BINS + 1]
        self.counts: Tensor | None = None  # int64 [L, E, NUM_BINS]
        self.above: Tensor | None = None  # int64 [L, E]
        self.total: Tensor | None = None  # fp64 [L, E], sums over tokens
        self.num_tokens = 0

    def update(self, seen: Observation) -> None:
        """Add a batch."""
        logits = seen.logits[seen.valid].double()  # [N, L, E]
        if not len(logits):
            return
        if self.edges is None:
            low, high = logits.amin((0, 2)), logits.amax((0, 2))  # [L]
            margin = ((high - low) / 2).clamp_min(1e-3)
            steps = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64)
            self.edges = (low - margin)[:, None] + (high - low + 2 * margin)[:, None] * steps
            self.counts = torch.zeros(*logits.shape[1:], NUM_BINS, dtype=torch.int64)
            self.above = torch.zeros(logits.shape[1:], dtype=torch.int64)
            self.total = torch.zeros(logits.shape[1:], dtype=torch.float64)
        assert self.counts is not None
        assert self.above is not None
        assert self.total is not None
        self.num_tokens += len(logits)
        self.total += logits.sum(0)
        for layer in range(logits.shape[1]):
            inner = self.edges[layer, 1:-1].contiguous()
            bins = torch.bucketize(logits[:, layer].t().contiguous(), inner, right=True)  # [E, N]
            self.counts[layer].scatter_add_(1, bins, torch.ones_like(bins))
        if self.threshold is not None:
            self.above += (logits > self.threshold.double()).sum(0)

    def means(self) -> Tensor:
        """Return the mean logit of each expert, fp64 [L, E]."""
        assert self.total is not None
        return self.total / self.num_tokens

    def limits(self, layer: int) -> tuple[float, float]:
        """Return the range of a layer's bins that are not empty."""
        assert self.edges is not None
        assert self.counts is not None
        filled = self.counts[layer].sum(0).nonzero()[:, 0]
        return float(self.edges[layer, filled.min()]), float(self.edges[layer, filled.max() + 1])


def section(
    results: Mapping[str, RouterLogits], layers: Sequence[str], rates: Mapping[str, Sequence[float]]
) -> Section:
    """Make the section of the report, for checkpoints with the same layers and target shares ``rates`` per layer."""
    rows: list[Row] = []
    figures = {}
    ends = [[result.limits(layer) for result in results.values()] for layer in range(len(layers))]
    limits = [(min(low for low, _ in of_layer), max(high for _, high in of_layer)) for of_layer in ends]
    for number, (label, result) in enumerate(results.items()):
        rows += _rows(label, result, layers, rates[label])
        name = "router_logits" if len(results) == 1 else f"router_logits_{number + 1}"
        figures[name] = _figure(label, result, layers, limits)
    summary = [
        _summary(label, result, layer, number, rates[label][number])
        for label, result in results.items()
        for number, layer in enumerate(layers)
    ]
    return Section(
        "router_logits", "Router logits and thresholds", TEXT, {"router_logits": rows}, figures, summary=summary
    )


def _summary(label: str, result: RouterLogits, layer: str, number: int, rate: float) -> Row:
    row: dict[str, str | float | None] = {"checkpoint": label, "layer": layer, "logit std": _std(result, number)}
    if result.threshold is None or result.above is None:
        return row | {"mean threshold": None, "share above / target": None}
    above = float(result.above[number].double().mean()) / result.num_tokens
    return row | {"mean threshold": float(result.threshold[number].mean()), "share above / target": above / rate}


def _std(result: RouterLogits, layer: int) -> float:
    """Return the standard deviation over tokens and experts, from the bins."""
    assert result.edges is not None
    assert result.counts is not None
    middle = (result.edges[layer, 1:] + result.edges[layer, :-1]) / 2
    weight = result.counts[layer].sum(0).double()
    mean = (weight * middle).sum() / weight.sum()
    return float(((weight * (middle - mean).square()).sum() / weight.sum()).sqrt())


def _rows(label: str, result: RouterLogits, layers: Sequence[str], rates: Sequence[float]) -> list[Row]:
    assert result.edges is not None
    assert result.counts is not None
    return [
        {
            "checkpoint": label,
            "layer": layer,
            "expert": expert,
            "threshold": None if result.threshold is None else float(result.threshold[number, expert]),
            "target_share": rates[number],
            "logit_from": float(result.edges[number, index]),
            "logit_to": float(result.edges[number, index + 1]),
            "tokens": int(count),
        }
        for number, layer in enumerate(layers)
        for expert in range(result.counts.shape[1])
        for index, count in enumerate(result.counts[number, expert].tolist())
        if count
    ]


def _figure(label: str, result: RouterLogits, layers: Sequence[str], limits: Sequence[tuple[float, float]]) -> Figure:
    from matplotlib.colors import LogNorm

    assert result.edges is not None
    assert result.counts is not None
    num_experts = result.counts.shape[1]
    figure, axes = panel_grid(len(layers), PANELS_IN_A_ROW, max(3.0, min(0.2 * num_experts, 5.0)), 2.9)
    for number, (axis, order) in enumerate(zip(axes, by_mean(result.means()).tolist(), strict=True)):
        counts, edges = result.counts[number, order], result.edges[number]
        density = counts.double() / max(1, result.num_tokens) / float(edges[1] - edges[0])
        axis.imshow(
            density.t().numpy(),
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap="Blues",
            norm=LogNorm(1e-3, 1.0),
            extent=(-0.5, num_experts - 0.5, float(edges[0]), float(edges[-1])),
        )
        axis.set_ylim(*limits[number])
        if result.threshold is not None:
            for rank, value in enumerate(result.threshold[number, order].tolist()):
                axis.plot([rank - 0.45, rank + 0.45], [value, value], color=COLORS[5], linewidth=1.8)
        axis.set_title(layers[number])
        label_experts(axis, order)
        place = axis.get_subplotspec()
        assert place is not None
        if place.is_last_row():
            axis.set_xlabel("expert, sorted by mean logit")
        if place.is_first_col():
            axis.set_ylabel("router logit r")
    bar = figure.colorbar(axes[0].images[0], ax=figure.axes, extend="both")
    bar.set_label("density per unit of logit", fontsize=9)
    figure.suptitle(wrapped(label, 80), fontsize=10)
    return figure
