"""Loss and use of the experts on text, under the causal rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.model import CausalLM


@dataclass(frozen=True)
class Measurement:
    """Loss and usage on a text.

    Args:
        loss: mean loss in nats per token.
        num_tokens: number of predicted tokens.
        window_losses: mean loss of each window, fp64 [windows].
        usage: for each MoE layer, share of the tokens that went to each expert over the target share, fp64 [E].
    """

    loss: float
    num_tokens: int
    window_losses: Tensor
    usage: list[Tensor]

    @property
    def worst(self) -> list[float]:
        """Largest distance of an expert's usage from its target, relative to the target, for each MoE layer."""
        return [float((usage - 1).abs().max()) for usage in self.usage]

    @property
    def fanout(self) -> list[float]:
        """Mean number of experts per token over the target, for each MoE layer."""
        return [float(usage.mean()) for usage in self.usage]


@torch.no_grad()
def measure(decoder: CausalLM, windows: Iterable[Tensor]) -> Measurement:
    """Measure loss and usage in one reading of the text.

    Args:
        decoder: decoder in ``eval()``.
        windows: batches int64 [B, S + 1]; each window's tokens but the last are inputs, all but the first are labels.
    """
    device = decoder.device
    layers = list(decoder.moe_layers())
    counts = [torch.zeros(layer.state.num_experts, dtype=torch.float64) for layer in layers]
    losses: list[Tensor] = []
    num_tokens = 0
    for batch in windows:
        batch = batch.to(device)
        loss = decoder(batch[:, :-1], labels=batch[:, 1:]).token_loss
        losses.append(loss.double().mean(-1).cpu())
        num_tokens += loss.numel()
        for count, layer in zip(counts, layers, strict=True):
            assert layer.record is not None
            count += layer.record.selection.mask.sum((0, 1)).double().cpu()
    usage = [count / (num_tokens * layer.state.rate) for count, layer in zip(counts, layers, strict=True)]
    window_losses = torch.cat(losses)
    return Measurement(float(window_losses.mean()), num_tokens, window_losses, usage)


def difference(losses: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return the mean difference of two losses of the same windows, and its standard error (NaN for one window).

    Args:
        losses: loss of each window, fp64 [windows].
        reference: the same for what is compared with.
    """
    differences = losses - reference
    return float(differences.mean()), float(differences.std()) / len(differences) ** 0.5
