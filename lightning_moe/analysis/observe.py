"""What a checkpoint does with a batch of text.

Shape letters: B sequences, S tokens, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.model import CausalLM
from lightning_moe.model.moe_layers import in_phase, named_moe_layers
from lightning_moe.model.routed_layer import RoutedLayer
from lightning_moe.routing import Phase
from lightning_moe.routing.base import RoutingRecord


@dataclass(frozen=True)
class Observation:
    """The result of a forward pass, on the CPU.

    Args:
        tokens: int64 [B, S], the inputs.
        valid: bool [B, S], false for the padding of a last window.
        domains: int64 [B], the domain of each sequence.
        loss: fp32 [B, S], loss of the next token's prediction in nats; 0 where not valid.
        logits: fp32 [B, S, L, E], router logits.
        experts: bool [B, S, L, E], the experts that each token took.
        gates: fp32 [B, S, L, E], the weights of the experts' outputs; 0 where the token did not take the expert.
        next_tokens: int64 [B, S], the token after each; -100 where not valid.
        predicted: int64 [B, S], the most probable next token; -100 where not valid; `None` if it was not asked for.
    """

    tokens: Tensor
    valid: Tensor
    domains: Tensor
    loss: Tensor
    logits: Tensor
    experts: Tensor
    gates: Tensor
    next_tokens: Tensor
    predicted: Tensor | None

    def is_full(self, batch_size: int) -> bool:
        """Return whether it has ``batch_size`` sequences and no padding."""
        return len(self.tokens) == batch_size and bool(self.valid.all())


@dataclass(frozen=True)
class Batch:
    """One batch of text.

    Args:
        input_ids: int64 [B, S].
        labels: int64 [B, S], shifted by one; −100 for padding.
        domains: int64 [B], index of each sequence's domain.
    """

    input_ids: Tensor
    labels: Tensor
    domains: Tensor


def observe(
    decoder: CausalLM, batch: Batch, phase: Phase = Phase.CAUSAL, with_predictions: bool = False
) -> Observation:
    """Run the decoder without gradients; nothing in it changes.

    Args:
        decoder: decoder to run.
        batch: text.
        phase: phase in which it routes.
        with_predictions: whether the result has ``predicted``, if the model can say it.
    """
    device = decoder.device
    layers = list(named_moe_layers(decoder).values())
    with in_phase(decoder, phase), _predicting(decoder, with_predictions):
        result = decoder(batch.input_ids.to(device), labels=batch.labels.to(device))
        records = [(layer, layer.record) for layer in layers if layer.record is not None]
        gates = [_gates(layer, record) for layer, record in records]
    if records:
        logits = torch.stack([record.logits for _, record in records], dim=2).cpu()
        experts = torch.stack([record.selection.mask for _, record in records], dim=2).cpu()
        weights = torch.stack(gates, dim=2).cpu()
    else:
        logits = torch.zeros(*batch.input_ids.shape, 0, decoder.num_experts)
        experts, weights = logits.bool(), logits
    return Observation(
        batch.input_ids,
        batch.labels != -100,
        batch.domains,
        result.token_loss.cpu(),
        logits,
        experts,
        weights,
        batch.labels,
        None if result.predicted is None else result.predicted.cpu(),
    )


@contextmanager
def _predicting(decoder: CausalLM, wanted: bool) -> Iterator[None]:
    before, decoder.predicts = decoder.predicts, wanted
    try:
        yield
    finally:
        decoder.predicts = before


def _gates(layer: RoutedLayer, record: RoutingRecord) -> Tensor:
    """Return the gates of a layer's last pass, fp32 [B, S, E]; 0 where they mean nothing."""
    mask = record.selection.mask
    return torch.where(mask, layer.gates(record.logits, mask), 0.0)
