"""Loss against active FLOPs as the dial for compute turns: the same weights, other numbers of experts per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_moe.analysis.observe import Batch, Observation, observe
from lightning_moe.analysis.section import Row, Section
from lightning_moe.analysis.style import GREY, grid, line_style
from lightning_moe.errors import UserError
from lightning_moe.model import Decoder, dialed, model_size

TEXT = """\
<p>The same checkpoint, asked for more or fewer routed experts per token than it was trained for (large marker).
Rules with thresholds read the thresholds of another target share off the sketch of each expert's scores that the
checkpoint keeps; token choice takes another k. Left: loss on the analysed text against the forward FLOPs that its
tokens really used. A flat curve left of the marker means compute that can be saved. Right: whether the dial
delivers what is asked for.</p>
<p><code>FLOPs per token = fixed part + Σ_l (mean fanout of layer l) · 2 · (parameters of one expert)</code>; the
fixed part is attention at half the context, shared experts, dense layers, routers and head.</p>"""


class DialSweep:
    """Loss and fanout at several settings of the dial.

    Args:
        decoder: with its routing state.
        factors: settings, as multiples of the experts per token that it was trained for; 1 is always measured.
    """

    def __init__(self, decoder: Decoder, factors: Sequence[float]) -> None:
        self.decoder = decoder
        layers = list(decoder.moe_layers())
        self.trained = [layer.state.num_experts_per_token for layer in layers]
        self.factors = sorted({1.0, *factors}) if layers else [1.0]
        self.refused: dict[float, str] = {}
        self.num_tokens = 0
        self.nll = dict.fromkeys(self.factors, 0.0)
        self.fanout = {factor: torch.zeros(len(layers), dtype=torch.float64) for factor in self.factors}
        size = model_size(decoder.config, layers[0].rule if layers else None)
        experts = [sum(p.numel() for p in layer.experts.parameters()) / layer.state.num_experts for layer in layers]
        self.flops_per_expert = torch.tensor([2 * count for count in experts], dtype=torch.float64)
        trained_flops = size.flops_per_token / 3  # training is three times the forward pass
        self.fixed_flops = trained_flops - float((torch.tensor(self.trained) * self.flops_per_expert).sum())

    def update(self, batch: Batch, seen: Observation) -> None:
        """Add a batch, and what the checkpoint did with it as it is."""
        self.num_tokens += int(seen.valid.sum())
        self._add(1.0, seen)
        for factor in self.factors:
            if factor == 1 or factor in self.refused:
                continue
            try:
                with dialed(self.decoder, [value * factor for value in self.trained]):
                    self._add(factor, observe(self.decoder, batch))
            except UserError as error:
                self.refused[factor] = str(error)

    def _add(self, factor: float, seen: Observation) -> None:
        self.nll[factor] += float(seen.loss.double().sum())
        self.fanout[factor] += seen.experts[seen.valid].sum((0, -1)).double()

    def points(self) -> list[dict[str, float]]:
        """One for each setting that the rule could serve, by factor."""
        return [
            {
                "factor": factor,
                "asked_fanout": sum(self.trained) * factor,
                "fanout": float(self.fanout[factor].sum()) / self.num_tokens,
                "flops_per_token": self.flops_per_token(self.fanout[factor] / self.num_tokens),
                "loss": self.nll[factor] / self.num_tokens,
            }
            for factor in self.factors
            if factor not in self.refused
        ]

    def flops_per_token(self, fanout: Tensor) -> float:
        """Forward FLOPs of a token, from the mean fanout fp64 [L]."""
        return self.fixed_flops + float((fanout * self.flops_per_expert).sum())


def section(sweeps: Mapping[str, DialSweep]) -> Section:
    """Of several checkpoints, dense ones included (a single point each)."""
    name = "compute"
    rows: list[Row] = []
    missing: list[str] = []
    figure, [[left, right]] = grid(1, 2, 4.6, 3.2)
    for index, (label, sweep) in enumerate(sweeps.items()):
        points = sweep.points()
        rows += [{"checkpoint": label, **point} for point in points]
        missing += [f"{label}, {factor:g} times: {reason}" for factor, reason in sweep.refused.items()]
        style = line_style(index)
        columns = {key: [point[key] for point in points] for key in points[0]}
        flops = [value / 1e6 for value in columns["flops_per_token"]]
        here = columns["factor"].index(1.0)
        marker = "o" if sweep.trained else "D"
        left.plot(flops, columns["loss"], marker="o", markersize=3.5, label=label, **style)
        left.plot(flops[here], columns["loss"][here], marker, color=style["color"], markersize=9, fillstyle="none")
        if sweep.trained:
            right.plot(columns["asked_fanout"], columns["fanout"], marker="o", markersize=3.5, label=label, **style)
    left.plot([], [], "o", color=GREY, markersize=9, fillstyle="none", label="as trained")
    if any(not sweep.trained for sweep in sweeps.values()):
        left.plot([], [], "D", color=GREY, markersize=9, fillstyle="none", label="dense")
    left.set_xlabel("forward FLOPs per token / millions")
    left.set_ylabel("loss / nats per token")
    left.legend(fontsize=7)
    if any(sweep.trained for sweep in sweeps.values()):
        ends = [0.0, max(sum(sweep.trained) * max(sweep.factors) for sweep in sweeps.values())]
        right.plot(ends, ends, color=GREY, linestyle=":", label="as asked")
        right.set_xlabel("routed experts asked for, all layers")
        right.set_ylabel("routed experts measured, all layers")
        right.legend(fontsize=7)
    else:
        right.set_visible(False)
    title = "Loss against active FLOPs"
    return Section(name, title, TEXT, {name: rows}, {name: figure}, summary=rows, missing=missing)
