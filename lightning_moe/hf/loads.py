"""The loads of the experts under the released choice, for any number of experts per token."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moe.hf.layer import TransformersLayer


class ReleasedLoads:
    """Counts how often each expert has which rank among a token's experts, by the scores of the released choice.

    Args:
        layer: MoE layer of a released model.
    """

    def __init__(self, layer: TransformersLayer) -> None:
        self.released, num_experts = layer.released, layer.state.num_experts
        self.bias = torch.zeros(num_experts) if layer.released_bias is None else layer.released_bias
        self.most = layer.released.most(num_experts)
        self.num_tokens = 0
        self.counts = torch.zeros(num_experts, num_experts, dtype=torch.int64)  # [rank, expert]

    def add(self, logits: Tensor) -> None:
        """Count the tokens of router logits fp32 [B, S, E]."""
        scores = self.released.choice_scores(logits, self.bias.to(logits.device)).flatten(0, 1)
        best_first = scores.argsort(dim=-1, descending=True, stable=True).cpu()
        self.num_tokens += len(best_first)
        ones = torch.ones_like(best_first)
        self.counts.scatter_add_(1, best_first.t(), ones.t())

    def shares(self, num_experts_per_token: float) -> Tensor:
        """Return the share of the tokens of each expert, fp64 [E], whose sum is ``num_experts_per_token``.

        Between whole numbers, and above what the released choice can serve, it is interpolated.
        """
        upto = torch.cat([torch.zeros_like(self.counts[:1]), self.counts.cumsum(0)]).double() / self.num_tokens
        low = min(int(num_experts_per_token), self.most)
        high = low + 1 if low < self.most else len(self.counts)
        part = (num_experts_per_token - low) / max(1, high - low)
        return upto[low].lerp(upto[high], part) if high > low else upto[low]
