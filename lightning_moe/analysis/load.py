"""Load of the experts: how evenly the tokens of the text are spread over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.analysis.experts import by_mean
from lightning_moe.analysis.section import Row, Section
from lightning_moe.analysis.specialization import Specialization
from lightning_moe.analysis.usage import CutoffUsage
from lightning_moe.report.axes import label_experts, share_limits
from lightning_moe.report.figures import COLORS, GREY, panel_grid, wrapped

PANELS_IN_A_ROW = 4
RARELY = 0.1  # of the layer's mean load

TEXT = """\
<p>The share of the analysed tokens that goes to each expert, relative to the target share ρ, with its standard
deviation over batches (bars). Experts are sorted by their load in each layer; the numbers below the axis are theirs.
The blue line is the layer's mean, the dotted one the target. All layers and checkpoints share the axis of the load.
The table measures evenness by the loads relative to the layer's mean: the busiest expert, the coefficient of variation
(standard deviation over experts / mean), experts without any token (dead), and all experts with less than a tenth of
the mean, dead ones included (rarely used).</p>
<p><code>load_i = Σ_t z_{t,i} / (ρN)</code></p>"""


@dataclass(frozen=True)
class Load:
    """The tokens of each expert over the whole text.

    Args:
        tokens: int64 [L, E], tokens that went to each expert.
        num_tokens: number N of tokens of the text.
        rates: target share ρ of each layer.
        std: fp64 [L, E], standard deviation over batches of the load relative to the target.
    """

    tokens: Tensor
    num_tokens: int
    rates: Sequence[float]
    std: Tensor

    @classmethod
    def of(cls, counts: Specialization, batches: CutoffUsage) -> Load:
        """Return the loads over all domains, and their fluctuation over the batches."""
        return cls(counts.load.sum(0), int(counts.tokens.sum()), batches.rates, batches.moments()["usage_std"])

    def to_target(self) -> Tensor:
        """Return the loads relative to the target, fp64 [L, E]."""
        return self.tokens / self.num_tokens / torch.tensor(self.rates, dtype=torch.float64)[:, None]

    def to_mean(self) -> Tensor:
        """Return the loads relative to the mean of their layer, fp64 [L, E]; 0 in a layer without tokens."""
        loads = self.tokens.double()
        return loads / loads.mean(-1, keepdim=True).clamp_min(1e-9)

    def busiest(self) -> tuple[float, int, int]:
        """Return the highest load relative to the mean of its layer, and the layer's and the expert's index."""
        relative = self.to_mean()
        layer, expert = divmod(int(relative.argmax()), relative.shape[1])
        return float(relative[layer, expert]), layer, expert

    def dead(self) -> Tensor:
        """Return which experts take no token, bool [L, E]."""
        return self.tokens == 0

    def rarely_used(self) -> Tensor:
        """Return which experts take less than a tenth of their layer's mean load, bool [L, E]; dead ones too."""
        return self.to_mean() < RARELY


def section(results: Mapping[str, Load], layers: Sequence[str]) -> Section:
    """Make the section of the report, for several checkpoints with the same layers.

    Args:
        results: label → loads.
        layers: names of the layers.
    """
    rows: list[Row] = []
    summary: list[Row] = []
    figures = {}
    panels = []
    num_experts = next(iter(results.values())).tokens.shape[1]
    width = max(2.4, min(0.16 * num_experts + 0.5, 6.0))
    for number, (label, load) in enumerate(results.items()):
        figure, axes = panel_grid(len(layers), PANELS_IN_A_ROW, width, 2.1)
        figures["load" if len(results) == 1 else f"load_{number + 1}"] = figure
        relative = load.to_target()
        for layer, (axis, order) in enumerate(zip(axes, by_mean(relative).tolist(), strict=True)):
            values, std = relative[layer, order], load.std[layer, order]
            bars = torch.stack([torch.minimum(std, values), std]).numpy()  # no load is below 0
            axis.errorbar(
                range(num_experts), values.numpy(), bars, fmt="o", markersize=4, elinewidth=1, color=COLORS[5]
            )
            axis.axhline(float(relative[layer].mean()), color=COLORS[0], linewidth=1, label="mean of the layer")
            axis.axhline(1.0, color=GREY, linestyle=":", linewidth=1.2, label="target")
            label_experts(axis, order)
            axis.set_title(layers[layer])
            axis.set_xlabel("expert, sorted by load")
        axes[0].legend(fontsize=7)
        figure.suptitle(wrapped(label, 80), fontsize=10)
        panels.append(axes)
        rows += _rows(label, load, layers)
        summary += [_summary(label, load, name, layer) for layer, name in enumerate(layers)]
    said = share_limits([axis for axes in panels for axis in axes], "y")
    for axes in panels:
        for axis in axes[::PANELS_IN_A_ROW]:
            axis.set_ylabel("tokens / target" + said.replace(" (", "\n("))
    return Section("load", "Load of the experts", TEXT, {"load": rows}, figures, summary=summary)


def _rows(label: str, load: Load, layers: Sequence[str]) -> list[Row]:
    to_target, to_mean = load.to_target(), load.to_mean()
    return [
        {
            "checkpoint": label,
            "layer": name,
            "expert": expert,
            "tokens": int(load.tokens[layer, expert]),
            "relative_to_target": float(to_target[layer, expert]),
            "std_over_batches": float(load.std[layer, expert]),
            "relative_to_mean": float(to_mean[layer, expert]),
        }
        for layer, name in enumerate(layers)
        for expert in range(to_mean.shape[1])
    ]


def _summary(label: str, load: Load, name: str, layer: int) -> Row:
    relative = load.to_mean()[layer]
    return {
        "checkpoint": label,
        "layer": name,
        "mean load / target": float(load.to_target()[layer].mean()),
        "highest / mean": float(relative.max()),
        "busiest expert": int(relative.argmax()),
        "lowest / mean": float(relative.min()),
        "coefficient of variation": float(relative.std(correction=0)),
        "dead": int(load.dead()[layer].sum()),
        "rarely used": int(load.rarely_used()[layer].sum()),
    }
