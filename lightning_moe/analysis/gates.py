"""Distribution of the gates: how a token's weight is spread over its experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_moe.analysis.observe import Observation
from lightning_moe.analysis.section import Row, Section
from lightning_moe.report.figures import COLORS, grid, layer_ticks, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_BINS = 50
MOST_RANKS = 8  # further ones are part of the sum only
RANKS_DRAWN = 4

TEXT = """\
<p>The weight (gate) with which an expert's output enters the sum. A token's chosen experts are ranked by their gates:
rank 1 is its largest, rank 2 the next. The last column has the sum of all of its gates, which is the weight of the
whole routed part beside the residual stream; tokens without an expert have the sum 0. Rows are layers, the first at the
top. Each row is a histogram (darker is denser; the colours of a row add up to its tokens) and a white ring marks its
mean. If ranks 1 and 2 lie close together, a token's experts have equal say, and it matters little which is first. If
rank 2 is near 0, fewer experts per token would change little. Gates that a model normalises have the sum 1.</p>
<p>Values above the largest one of the first batch are counted in the last bin; the means are exact.</p>"""


class Gates:
    """Histograms of the gate of each rank and of the sum of a token's gates, per layer.

    Args:
        num_layers: number L of MoE layers.
        num_experts: number E of experts.

    Attributes:
        counts: int64 [L, R + 1, bins] with R = min(E, `MOST_RANKS`); the last of R + 1 is the sum.
        tokens: int64 [L, R + 1], tokens that have so many experts; all tokens for the sum.
        total: fp64 [L, R + 1], the gates added up; ``squares`` their squares.
        top: upper end of the last bin of all ranks, and of the sum; the first batch sets them.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_ranks = min(num_experts, MOST_RANKS)
        shape = (num_layers, self.num_ranks + 1)
        self.counts = torch.zeros(*shape, NUM_BINS, dtype=torch.int64)
        self.tokens = torch.zeros(shape, dtype=torch.int64)
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.squares = torch.zeros(shape, dtype=torch.float64)
        self.top: tuple[float, float] | None = None

    def update(self, seen: Observation) -> None:
        """Add a batch."""
        gates, experts = seen.gates[seen.valid], seen.experts[seen.valid]  # [N, L, E]
        # Chosen experts first, whatever their gate is: it may be 0.
        ranked = torch.where(experts, gates, -torch.inf).topk(self.num_ranks).values
        values = torch.cat([ranked, gates.sum(-1, keepdim=True)], dim=-1).double()  # [N, L, R + 1]
        there = values.isfinite()
        values = values.where(there, 0.0)
        if not len(values):
            return
        if self.top is None:
            self.top = max(1.0, float(values[..., :-1].max())), max(1.0, float(values[..., -1].max()))
        top = torch.tensor([*[self.top[0]] * self.num_ranks, self.top[1]], dtype=torch.float64)
        bins = (values / top * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        # one number for each cell of `counts`
        cell = torch.arange(self.tokens.numel()).view_as(self.tokens) * NUM_BINS + bins
        self.counts += torch.bincount(cell[there], minlength=self.counts.numel()).view_as(self.counts)
        self.tokens += there.sum(0)
        self.total += values.sum(0)
        self.squares += values.square().sum(0)

    def edges(self, place: int) -> list[float]:
        """Return the ends of the bins of a rank (from 0), or of the sum (the number of ranks)."""
        assert self.top is not None
        return torch.linspace(0, self.top[place == self.num_ranks], NUM_BINS + 1, dtype=torch.float64).tolist()

    def means(self) -> Tensor:
        """Return the mean gates, fp64 [L, R + 1]; NaN where no token has so many experts."""
        return self.total / self.tokens

    def std(self) -> Tensor:
        """Return the standard deviations over tokens, fp64 [L, R + 1]; NaN where there is no token."""
        return (self.squares / self.tokens - self.means().square()).clamp_min(0).sqrt()


def section(results: Mapping[str, Gates], layers: Sequence[str]) -> Section:
    """Make the section of the report, for several checkpoints with the same layers."""
    rows = [row for label, result in results.items() for row in _rows(label, result, layers)]
    summary = [
        _summary(label, result, name, layer) for label, result in results.items() for layer, name in enumerate(layers)
    ]
    return Section("gates", "Gates", TEXT, {"gates": rows}, {"gates": _figure(results, layers)}, summary=summary)


def _names(result: Gates) -> list[str]:
    return [*(f"rank {rank + 1}" for rank in range(result.num_ranks)), "sum"]


def _rows(label: str, result: Gates, layers: Sequence[str]) -> list[Row]:
    return [
        {"checkpoint": label, "layer": name, "gate": of, "from": low, "to": high, "tokens": count}
        for place, of in enumerate(_names(result))
        for layer, name in enumerate(layers)
        for (low, high), count in zip(pairwise(result.edges(place)), result.counts[layer, place].tolist(), strict=True)
        if count
    ]


def _summary(label: str, result: Gates, name: str, layer: int) -> Row:
    means, std = result.means()[layer], result.std()[layer]
    row: dict[str, str | float | None] = {"checkpoint": label, "layer": name}
    for rank in range(min(2, result.num_ranks)):
        there = bool(result.tokens[layer, rank])
        row[f"rank {rank + 1}, mean"] = float(means[rank]) if there else None
        row[f"tokens with rank {rank + 1}"] = float(result.tokens[layer, rank] / result.tokens[layer, -1])
    return row | {"sum, mean": float(means[-1]), "sum, std": float(std[-1])}


def _figure(results: Mapping[str, Gates], layers: Sequence[str]) -> Figure:
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    num_ranks = next(iter(results.values())).num_ranks
    used = max(int((result.tokens[:, :-1].sum(0) > 0).sum()) for result in results.values())
    places = [*range(max(1, min(used, RANKS_DRAWN))), num_ranks]
    height = max(1.3, 0.16 * len(layers) + 0.8)
    figure, axes = grid(len(results), len(places), 2.5, height, sharey=True)
    norm = PowerNorm(0.4, 0, 1)
    for line, (label, result) in zip(axes, results.items(), strict=True):
        shares = result.counts.double() / result.tokens[..., None].clamp_min(1)
        for axis, place in zip(line, places, strict=True):
            axis.imshow(
                shares[:, place].numpy(),
                cmap="Blues",
                norm=norm,
                aspect="auto",
                interpolation="nearest",
                extent=(0, result.edges(place)[-1], len(layers) - 0.5, -0.5),
            )
            axis.plot(
                result.means()[:, place], range(len(layers)), "o", markersize=4, markeredgewidth=1,
                markeredgecolor=COLORS[5], markerfacecolor="white", linestyle="none",
            )  # fmt: skip
            axis.set_title(_names(result)[place])
            axis.set_xlim(0, max(other.edges(place)[-1] for other in results.values()))
            axis.xaxis.set_major_locator(MaxNLocator(3))
            layer_ticks(axis.yaxis, layers, most=24)
        line[0].set_ylabel(wrapped(label, 20) + "\n\nlayer", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("gate")
    axes[-1][-1].set_xlabel("sum of the gates")
    bar = figure.colorbar(axes[0][0].images[0], ax=[axis for line in axes for axis in line], aspect=30)
    bar.set_label("share of the row's tokens", fontsize=9)
    return figure
