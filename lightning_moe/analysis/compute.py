"""Loss against active FLOPs: the same weights routed to other numbers of experts per token (the compute dial)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_moe.analysis.observe import Batch, Observation, observe
from lightning_moe.analysis.section import Row, Section
from lightning_moe.errors import UserError
from lightning_moe.model import CausalLM, inference_num_experts_per_token
from lightning_moe.report.figures import GREY, grid, line_style

TEXT = """\
<p>The same checkpoint, asked for more or fewer routed experts per token than it was trained for (large marker).
Rules with thresholds read the thresholds of another target share off the sketch of each expert's scores that the
checkpoint keeps; token choice takes another k. Left: loss on the analysed text against the forward FLOPs that its
tokens really used. A flat curve left of the marker means compute that can be saved. Right: whether what
is asked for is what the tokens get.</p>
<p><code>FLOPs per token = fixed part + Σ_l (mean fanout of layer l) · 2 · (parameters of one expert)</code>; the
fixed part is attention at half the context, shared experts, dense layers, routers and head.</p>"""

DEFAULT_FACTORS = (0.25, 0.5, 2.0, 4.0)  # times what a checkpoint was trained for


class ComputeSweep:
    """The loss and the fanout at several numbers of experts per token.

    Args:
        decoder: decoder with its routing state.
        values: values of ``inference_num_experts_per_token``, as means over the MoE layers, which keep their trained
            proportions; `None` means `DEFAULT_FACTORS`. The value that it was trained for is always measured.
    """

    def __init__(self, decoder: CausalLM, values: Sequence[float] | None = None) -> None:
        self.decoder = decoder
        layers = list(decoder.moe_layers())
        self.trained = [layer.state.num_experts_per_token for layer in layers]
        self.as_trained = sum(self.trained) / max(1, len(layers))
        if values is None:
            values = [factor * self.as_trained for factor in DEFAULT_FACTORS]
        self.values = sorted({self.as_trained, *values}) if layers else [self.as_trained]
        self.refused: dict[float, str] = {}
        self.num_tokens = 0
        self.nll = dict.fromkeys(self.values, 0.0)
        self.fanout = {value: torch.zeros(len(layers), dtype=torch.float64) for value in self.values}
        experts = [layer.parameters_per_expert for layer in layers]
        self.flops_per_expert = torch.tensor([2 * count for count in experts], dtype=torch.float64)
        trained_flops = decoder.size.flops_per_token / 3  # training is three times the forward pass
        self.fixed_flops = trained_flops - float((torch.tensor(self.trained) * self.flops_per_expert).sum())

    def update(self, batch: Batch, seen: Observation) -> None:
        """Add a batch, and what the checkpoint did with it at its own value."""
        self.num_tokens += int(seen.valid.sum())
        self._add(self.as_trained, seen)
        for value in self.values:
            if value == self.as_trained or value in self.refused:
                continue
            try:
                with inference_num_experts_per_token(
                    self.decoder, [trained * value / self.as_trained for trained in self.trained]
                ):
                    self._add(value, observe(self.decoder, batch))
            except UserError as error:
                self.refused[value] = str(error)

    def _add(self, value: float, seen: Observation) -> None:
        self.nll[value] += float(seen.loss.double().sum())
        self.fanout[value] += seen.experts[seen.valid].sum((0, -1)).double()

    def points(self) -> list[dict[str, float]]:
        """Return one point for each value that the rule could serve, in ascending order."""
        return [
            {
                "inference_num_experts_per_token": value,
                "asked_fanout": value * len(self.trained),
                "fanout": float(self.fanout[value].sum()) / self.num_tokens,
                "flops_per_token": self.flops_per_token(self.fanout[value] / self.num_tokens),
                "loss": self.nll[value] / self.num_tokens,
            }
            for value in self.values
            if value not in self.refused
        ]

    def flops_per_token(self, fanout: Tensor) -> float:
        """Return the forward FLOPs of a token, from the mean fanout fp64 [L]."""
        return self.fixed_flops + float((fanout * self.flops_per_expert).sum())


def section(sweeps: Mapping[str, ComputeSweep]) -> Section:
    """Make the section of the report, for several checkpoints; a dense one is a single point."""
    name = "compute"
    rows: list[Row] = []
    missing: list[str] = []
    figure, [[left, right]] = grid(1, 2, 4.6, 3.2)
    for index, (label, sweep) in enumerate(sweeps.items()):
        points = sweep.points()
        rows += [{"checkpoint": label, **point} for point in points]
        missing += [f"{label}: {reason}" for reason in sweep.refused.values()]
        style = line_style(index)
        columns = {key: [point[key] for point in points] for key in points[0]}
        flops = [value / 1e6 for value in columns["flops_per_token"]]
        here = columns["inference_num_experts_per_token"].index(sweep.as_trained)
        if not sweep.trained:
            left.plot(flops, columns["loss"], "D", color=style["color"], markersize=6, label=label)
            continue
        left.plot(flops, columns["loss"], marker="o", markersize=3.5, label=label, **style)
        left.plot(flops[here], columns["loss"][here], "o", color=style["color"], markersize=9, fillstyle="none")
        right.plot(columns["asked_fanout"], columns["fanout"], marker="o", markersize=3.5, label=label, **style)
    if any(sweep.trained for sweep in sweeps.values()):
        left.plot([], [], "o", color=GREY, markersize=9, fillstyle="none", label="as trained")
        ends = [0.0, max(max(sweep.values) * len(sweep.trained) for sweep in sweeps.values())]
        right.plot(ends, ends, color=GREY, linestyle=":", label="as asked")
        right.set_xlabel("routed experts asked for, all layers")
        right.set_ylabel("routed experts measured, all layers")
        right.legend(fontsize=7)
    else:
        right.set_visible(False)
    left.set_xlabel("forward FLOPs per token / millions")
    left.set_ylabel("loss / nats per token")
    left.legend(fontsize=7)
    title = "Loss against active FLOPs"
    names = {
        "checkpoint": "checkpoint",
        "inference_num_experts_per_token": "experts per token asked for, mean of layers",
        "asked_fanout": "fanout asked for, all layers",
        "fanout": "fanout measured",
        "flops_per_token": "forward FLOPs per token",
        "loss": "loss / nats per token",
    }
    summary = [{names[key]: value for key, value in row.items()} for row in rows]
    return Section(name, title, TEXT, {name: rows}, {name: figure}, summary=summary, missing=missing)
