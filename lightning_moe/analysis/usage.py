"""Cutoff against usage, batch by batch (the paper's Fig. 3): what varies under expert choice and under thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_moe.analysis.observe import Observation
from lightning_moe.analysis.section import Row, Section
from lightning_moe.report.axes import share_limits
from lightning_moe.report.figures import COLORS, GREY, grid, layer_ticks, wrapped
from lightning_moe.routing import target_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BATCHES = 128  # kept for the figure; of more, evenly spaced ones

TEXT = """\
<p>Either the cutoff is fixed and usage fluctuates (thresholds), or usage is fixed and the cutoff fluctuates
(experts choose their k best tokens of the batch). Left: the cutoff that expert choice would use in each batch,
minus the stored threshold; thresholds are the line at 0. Right: the share of the batch that the stored thresholds
select, relative to the target; expert choice is the line at 1. One box per layer over all batches and experts:
median, quartiles, 5% and 95%. All checkpoints share their axes. Boxes far off the lines mean thresholds that do not fit
this text; wide boxes, noise of a batch this small. A batch with less than half of the tokens of the first, such as the
last may be, is left out.</p>
<p><code>cutoff_i = k-th largest of r_{·,i} over the batch, k = ρN</code>; <code>usage_i = Σ_t 1{r_{t,i} &gt; c_i} /
(ρN)</code>.</p>"""


class CutoffUsage:
    """The cutoff and the usage of every batch; the memory is that of `MOST_BATCHES` batches.

    Args:
        threshold: fp32 [L, E], or `None` for rules without thresholds.
        rates: target share ρ of each layer.
    """

    def __init__(self, threshold: Tensor | None, rates: Sequence[float]) -> None:
        self.threshold, self.rates = threshold, rates
        self.num_batches = self.num_tokens = 0
        self._first = 0  # tokens of the first batch, which is a full one where there are several
        self._every = 1
        self._deviation: list[Tensor] = []
        self._usage: list[Tensor] = []
        self._sums = torch.zeros(4, len(rates), 0, dtype=torch.float64)

    def update(self, seen: Observation) -> None:
        """Add a batch. The usage is that of the observed experts, which for a causal pass are the thresholds'."""
        logits, experts = seen.logits[seen.valid], seen.experts[seen.valid]  # [N, L, E]
        if len(logits) == 0 or 2 * len(logits) < self._first:
            return
        self._first = self._first or len(logits)
        usage = experts.sum(0).double() / len(experts) / torch.tensor(self.rates, dtype=torch.float64)[:, None]
        deviation = torch.zeros_like(usage)
        if self.threshold is not None:
            deviation = (_cutoffs(logits, self.rates) - self.threshold).double()
        if not self._sums.shape[-1]:
            self._sums = torch.zeros(4, *usage.shape, dtype=torch.float64)
        self._sums += torch.stack([deviation, deviation.square(), usage, usage.square()])
        if self.num_batches % self._every == 0:
            self._deviation.append(deviation.float())
            self._usage.append(usage.float())
        self.num_batches += 1
        self.num_tokens += len(logits)
        if len(self._usage) > MOST_BATCHES:
            self._every *= 2
            self._deviation, self._usage = self._deviation[::2], self._usage[::2]

    def moments(self) -> dict[str, Tensor]:
        """Return the mean and the standard deviation over all batches, fp64 [L, E]."""
        mean = self._sums / max(1, self.num_batches)
        spread = (mean[1::2] - mean[::2].square()).clamp_min(0).sqrt()
        values = {"usage_mean": mean[2], "usage_std": spread[1]}
        if self.threshold is not None:
            values |= {"cutoff_deviation_mean": mean[0], "cutoff_deviation_std": spread[0]}
        return values

    def threshold_error(self) -> tuple[float, float] | tuple[None, None]:
        """Return how far thresholds are off, and how far the cutoff of a batch fluctuates, means over all experts.

        The error is the distance between the threshold and the mean of the batches' cutoffs, so that errors of two
        experts do not cancel. Both are in logit units; `None` for rules without thresholds.
        """
        moments = self.moments()
        if self.threshold is None:
            return None, None
        return float(moments["cutoff_deviation_mean"].abs().mean()), float(moments["cutoff_deviation_std"].mean())

    def kept(self) -> tuple[Tensor | None, Tensor]:
        """Return deviations (`None` without thresholds) and usages of the kept batches, fp32 [batches, L, E]."""
        return None if self.threshold is None else torch.stack(self._deviation), torch.stack(self._usage)


def _cutoffs(logits: Tensor, rates: Sequence[float]) -> Tensor:
    """Return the k-th largest logit of each expert, [L, E] of [N, L, E]."""
    counts = [target_count(len(logits), rate) for rate in rates]
    return torch.stack([logits[:, layer].topk(count, dim=0).values[-1] for layer, count in enumerate(counts)])


def section(results: Mapping[str, CutoffUsage], layers: Sequence[str]) -> Section:
    """Make the section of the report, for several checkpoints with the same layers."""
    rows: list[Row] = []
    summary: list[Row] = []
    figure, axes = grid(len(results), 2, max(3.6, 0.35 * len(layers) + 1.4), 2.4)
    for (left, right), (label, result) in zip(axes, results.items(), strict=True):
        deviation, usage = result.kept()
        tokens = result.num_tokens / max(1, result.num_batches)
        title = f"{wrapped(label, 48)}\n{result.num_batches} batches of about {tokens:,.0f} tokens"
        if deviation is None:
            left.set_visible(False)
            right.set_title(f"{title}; no thresholds", loc="left")
        else:
            left.set_title(title, loc="left")
            _boxes(left, deviation, layers, 0.0)
        _boxes(right, usage, layers, 1.0)
        rows += _rows(label, result, layers)
        summary.append(_summary(label, result))
    thresholds = [left for left, _ in axes if left.get_visible()]
    if thresholds:
        share_limits(thresholds, "y", amounts=False)
    said = share_limits([right for _, right in axes], "y")
    for left, right in axes:
        left.set_ylabel("batch cutoff − threshold\n/ logit units")
        right.set_ylabel("usage / target" + said.replace(" (", "\n("))
    name = "cutoff_vs_usage"
    without = [label for label, result in results.items() if result.threshold is None]
    missing = [f"{label}: no thresholds to compare a cutoff with; its usage is shown." for label in without]
    title = "Cutoff and usage per batch"
    return Section(name, title, TEXT, {name: rows}, {name: figure}, summary=summary, missing=missing)


def _boxes(axis: Axes, values: Tensor, layers: Sequence[str], reference: float) -> None:
    blue, red = {"color": COLORS[0]}, {"color": COLORS[5], "linewidth": 1.6}
    axis.boxplot(
        values.transpose(0, 1).flatten(1).numpy().T, whis=(5, 95), showfliers=False, widths=0.6,
        medianprops=red, boxprops=blue, whiskerprops=blue, capprops=blue,
    )  # fmt: skip
    layer_ticks(axis.xaxis, layers, most=16, first=1)
    axis.set_xlabel("layer")
    axis.axhline(reference, color=GREY, linestyle=":", linewidth=1.2)


def _rows(label: str, result: CutoffUsage, layers: Sequence[str]) -> list[Row]:
    moments = result.moments()
    return [
        {
            "checkpoint": label,
            "layer": layer,
            "expert": expert,
            "batches": result.num_batches,
            "tokens": result.num_tokens,
            **{name: float(value[number, expert]) for name, value in moments.items()},
        }
        for number, layer in enumerate(layers)
        for expert in range(moments["usage_mean"].shape[1])
    ]


def _summary(label: str, result: CutoffUsage) -> Row:
    moments = result.moments()
    row: dict[str, str | float | None] = {
        "checkpoint": label,
        "usage / target, mean": float(moments["usage_mean"].mean()),
        "usage / target, std over batches": float(moments["usage_std"].mean()),
    }
    mean = moments.get("cutoff_deviation_mean")
    row["cutoff − threshold, mean"] = None if mean is None else float(mean.mean())
    row["|cutoff − threshold|, mean"], row["cutoff − threshold, std over batches"] = result.threshold_error()
    return row
