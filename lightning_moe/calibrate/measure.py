"""Loss and use of the experts on text, under the causal rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.model import Decoder, next_token_loss


@dataclass(frozen=True)
class Measurement:
    """Args:
    loss: nats per token.
    num_tokens: tokens that were predicted.
    usage: of each MoE layer fp64 [E], share of the tokens that went to each expert over the target share.
    """

    loss: float
    num_tokens: int
    usage: list[Tensor]

    @property
    def worst(self) -> list[float]:
        """Of each MoE layer, the largest distance of an expert's usage from its target, relative to that."""
        return [float((usage - 1).abs().max()) for usage in self.usage]

    @property
    def fanout(self) -> list[float]:
        """Of each MoE layer, its tokens' mean number of experts over the target."""
        return [float(usage.mean()) for usage in self.usage]


@torch.no_grad()
def measure(decoder: Decoder, windows: Iterable[Tensor]) -> Measurement:
    """Read the text once.

    Args:
        decoder: in ``eval()``.
        windows: int64 [B, S + 1] batches; each window's tokens but the last are inputs, all but the first labels.
    """
    device = decoder.embedding.weight.device
    layers = list(decoder.moe_layers())
    counts = [torch.zeros(layer.state.num_experts, dtype=torch.float64) for layer in layers]
    total, num_tokens = 0.0, 0
    for batch in windows:
        batch = batch.to(device)
        loss = next_token_loss(decoder(batch[:, :-1]).logits, batch[:, 1:])
        total, num_tokens = total + float(loss.double().sum()), num_tokens + loss.numel()
        for count, layer in zip(counts, layers, strict=True):
            assert layer.record is not None
            count += layer.record.selection.mask.sum((0, 1)).double().cpu()
    usage = [count / (num_tokens * layer.state.rate) for count, layer in zip(counts, layers, strict=True)]
    return Measurement(total / num_tokens, num_tokens, usage)
