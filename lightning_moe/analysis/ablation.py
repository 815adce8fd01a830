"""Causal ablation: the loss of the same model when one expert is taken away from all tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_moe.analysis.experts import by_mean
from lightning_moe.analysis.observe import Batch, Observation
from lightning_moe.analysis.section import Row, Section
from lightning_moe.model import CausalLM
from lightning_moe.model.moe_layers import in_phase, named_moe_layers
from lightning_moe.model.routed_layer import RoutedLayer
from lightning_moe.report.axes import text_color
from lightning_moe.report.figures import grid, layer_ticks, wrapped
from lightning_moe.routing import Phase, RoutingRule, RoutingState, Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

MOST_NUMBERS = 32  # of the experts of a layer

TEXT = """\
<p>How much worse the predictions become when one expert is taken away from every token that chose it. The token keeps
its other experts and gets no other one instead; where the model normalises gates, those of the rest are normalised
again. Later layers see the changed input and choose for themselves. Left: the change of the mean loss over all tokens,
which says how important the expert is. Right: the whole change divided by the tokens that took the expert, which says
how much one use of it is worth. Rows are layers; in each, experts are sorted, and the number in a cell is the expert's.
Orange: the expert helps. Purple: without it, the text is predicted better. A change within two standard errors of 0
says nothing (standard errors treat tokens as independent, so they are too small rather than too large). Changes do not
add up: two experts that stand in for each other both look unimportant.</p>
<p><code>Δ_i = mean_t (loss_t without i − loss_t)</code>; <code>per use = N Δ_i / N_i</code>; the numbers also have the
mean change of the predictions made at the N_i tokens themselves, without those of later tokens that attend to
them.</p>"""


@dataclass(frozen=True)
class WithoutExpert(RoutingRule):
    """The choice of another rule without one expert.

    Args:
        rule: rule that chooses.
        expert: index of the expert that no token takes.
    """

    rule: RoutingRule
    expert: int

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        selection = self.rule.select(logits, state, phase)
        mask = selection.mask.clone()
        mask[..., self.expert] = False
        return Selection(mask, max_pairs=selection.max_pairs)


@contextmanager
def without_expert(layer: RoutedLayer, expert: int) -> Iterator[None]:
    """Inside the block, let no token of a layer take an expert."""
    before = layer.rule
    layer.rule = WithoutExpert(before, expert)
    try:
        yield
    finally:
        layer.rule = before


class Ablation:
    """The loss without each expert, on the first windows of the text.

    Each expert of each layer costs a pass over these windows. One that takes none of their tokens costs nothing.

    Args:
        decoder: decoder with experts.
        max_tokens: number of tokens to use, rounded up to whole windows; 0 switches the measurement off.

    Attributes:
        num_tokens: number N of tokens so far.
        routed: fp64 [L, E], tokens N_i that took each expert.
        delta: fp64 [L, E], change of the loss added up over all tokens; ``squares`` its squares, and ``delta_routed``
            the sum over the tokens that took the expert.
    """

    def __init__(self, decoder: CausalLM, max_tokens: int) -> None:
        self.decoder, self.max_tokens = decoder, max_tokens
        self._layers = list(named_moe_layers(decoder).values())
        shape = (len(self._layers), decoder.num_experts)
        self.num_tokens = 0
        self.routed, self.delta, self.squares, self.delta_routed = torch.zeros(4, *shape, dtype=torch.float64)

    def update(self, batch: Batch, seen: Observation) -> None:
        """Add the windows of a batch that are still wanted; ``seen`` is what the checkpoint does with all of them."""
        before = self.num_tokens + seen.valid.sum(-1).cumsum(0) - seen.valid.sum(-1)
        rows = before < self.max_tokens
        if not rows.any():
            return
        valid, experts, loss = seen.valid[rows], seen.experts[rows], seen.loss[rows].double()
        device = self.decoder.device
        tokens, labels = batch.input_ids[rows].to(device), batch.labels[rows].to(device)
        self.num_tokens += int(valid.sum())
        for number, layer in enumerate(self._layers):
            for expert in range(layer.state.num_experts):
                routed = experts[:, :, number, expert] & valid
                if not routed.any():
                    continue
                with in_phase(self.decoder, Phase.CAUSAL), without_expert(layer, expert):
                    delta = self.decoder(tokens, labels=labels).token_loss.cpu().double() - loss
                self.routed[number, expert] += routed.sum()
                self.delta[number, expert] += delta.sum()
                self.squares[number, expert] += delta.square().sum()
                self.delta_routed[number, expert] += delta[routed].sum()

    def mean(self) -> tuple[Tensor, Tensor]:
        """Return the change of the mean loss over all tokens and its standard error, in nats, fp64 [L, E] each."""
        mean = self.delta / self.num_tokens
        variance = (self.squares / self.num_tokens - mean.square()).clamp_min(0)
        return mean, (variance / self.num_tokens).sqrt()

    def per_use(self) -> Tensor:
        """Return the whole change per token that took the expert, in nats, fp64 [L, E]; 0 where none did."""
        per_use: Tensor = self.delta / self.routed.clamp_min(1)
        return per_use


def section(results: Mapping[str, Ablation], layers: Sequence[str]) -> Section:
    """Make the section of the report, for several checkpoints with the same layers."""
    name, title = "ablation", "Loss without an expert"
    measured = {label: result for label, result in results.items() if result.num_tokens}
    passes = max(result.delta.numel() for result in results.values())
    if not measured:
        note = f"Each of the {passes} experts costs a pass over the tokens used: give --ablation_tokens 2048."
        return Section(name, title, TEXT, missing=(note,))
    rows = [row for label, result in measured.items() for row in _rows(label, result, layers)]
    summary = [
        _summary(label, result, layer, number)
        for label, result in measured.items()
        for number, layer in enumerate(layers)
    ]
    return Section(name, title, TEXT, {name: rows}, {name: _figure(measured, layers)}, summary=summary)


def _rows(label: str, result: Ablation, layers: Sequence[str]) -> list[Row]:
    (mean, error), per_use = result.mean(), result.per_use()
    return [
        {
            "checkpoint": label,
            "layer": name,
            "expert": expert,
            "tokens": result.num_tokens,
            "routed_tokens": int(result.routed[layer, expert]),
            "delta_loss": float(mean[layer, expert]),
            "standard_error": float(error[layer, expert]),
            "delta_per_routed_token": float(per_use[layer, expert]),
            "delta_of_routed_tokens": float(result.delta_routed[layer, expert] / result.routed[layer, expert])
            if result.routed[layer, expert]
            else None,
        }
        for layer, name in enumerate(layers)
        for expert in range(mean.shape[1])
    ]


def _summary(label: str, result: Ablation, name: str, layer: int) -> Row:
    mean, error = (values[layer] for values in result.mean())
    most = int(mean.argmax())
    return {
        "checkpoint": label,
        "layer": name,
        "tokens": result.num_tokens,
        "mean Δ loss / nats": float(mean.mean()),
        "most important expert": most,
        "its Δ loss": float(mean[most]),
        "± standard error": float(error[most]),
        "its Δ per use": float(result.per_use()[layer, most]),
        "experts with Δ below 2 standard errors": int((mean <= 2 * error).sum()),
    }


def _figure(results: Mapping[str, Ablation], layers: Sequence[str]) -> Figure:
    from matplotlib.colors import SymLogNorm

    num_experts = next(iter(results.values())).delta.shape[1]
    width, height = max(3.4, min(0.2 * num_experts, 9.0)), max(1.5, 0.24 * len(layers) + 0.9)
    figure, axes = grid(len(results), 2, width, height, sharey=True)
    shown = {label: (result.mean()[0], result.per_use()) for label, result in results.items()}
    for column, title in enumerate(("Δ loss, all tokens / nats", "Δ per token that took the expert / nats")):
        most = max(float(values[column].abs().max()) for values in shown.values()) or 1.0
        norm = SymLogNorm(most / 30, vmin=-most, vmax=most)
        for line, (label, values) in zip(axes, shown.items(), strict=True):
            _draw(line[column], values[column], norm)
            line[column].set_title(title)
            layer_ticks(line[column].yaxis, layers, most=24)
            line[0].set_ylabel(wrapped(label, 20) + "\n\nlayer", fontsize=8)
        axes[-1][column].set_xlabel("experts, sorted")
        bar = figure.colorbar(axes[0][column].images[0], ax=[line[column] for line in axes])
        bar.set_ticks([-most, -most / 10, 0, most / 10, most])
        bar.set_ticklabels([f"{tick:.3g}" for tick in (-most, -most / 10, 0, most / 10, most)])
        bar.minorticks_off()
    return figure


def _draw(axis: Axes, values: Tensor, norm: Normalize) -> None:
    """Draw changes [L, E], sorted in each layer, with the experts' numbers."""
    order = by_mean(values)
    shown = values.gather(1, order)
    image = axis.imshow(shown.numpy(), cmap="PuOr_r", norm=norm, aspect="auto", interpolation="nearest")
    axis.set_xticks([])
    step = -(-order.shape[1] // MOST_NUMBERS)
    for layer, experts in enumerate(order.tolist()):
        for place, expert in list(enumerate(experts))[::step]:
            color = text_color(image.cmap(float(norm(float(shown[layer, place])))))
            axis.text(place, layer, str(expert), ha="center", va="center", color=color, fontsize=6)
