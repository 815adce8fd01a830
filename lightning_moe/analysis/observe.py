"""What a checkpoint does with a batch of text.

Shape letters: B sequences, S tokens, L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.model import CausalLM
from lightning_moe.model.moe_layers import in_phase, named_moe_layers
from lightning_moe.routing import Phase


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
    """

    tokens: Tensor
    valid: Tensor
    domains: Tensor
    loss: Tensor
    logits: Tensor
    experts: Tensor

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


def observe(decoder: CausalLM, batch: Batch, phase: Phase = Phase.CAUSAL) -> Observation:
    """Run the decoder without gradients, routed as in ``phase``; nothing in it changes."""
    device = decoder.device
    with in_phase(decoder, phase):
        loss = decoder(batch.input_ids.to(device), labels=batch.labels.to(device)).token_loss.cpu()
    records = [layer.record for layer in named_moe_layers(decoder).values() if layer.record is not None]
    if records:
        logits = torch.stack([record.logits for record in records], dim=2).cpu()
        experts = torch.stack([record.selection.mask for record in records], dim=2).cpu()
    else:
        logits = torch.zeros(*batch.input_ids.shape, 0, decoder.num_experts)
        experts = logits.bool()
    return Observation(batch.input_ids, batch.labels != -100, batch.domains, loss, logits, experts)
