"""The weights that a released model gives to the outputs of chosen experts, for any choice of any size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: ``softmax``: over all experts. ``sigmoid``: of each expert. ``sparsemixer``: the weight of the expert of rank n is a
#: softmax over the experts from rank n on that are close to it (Phi-3.5-MoE, arXiv 2409.12136).
GateScore = Literal["softmax", "sigmoid", "sparsemixer"]


@dataclass(frozen=True)
class Gating:
    """A formula for gates.

    Args:
        score: scores of the experts, from the router's logits.
        normalize: whether the gates of a token's experts sum to ``scale``.
        scale: factor of all gates.
        jitter: of ``sparsemixer``, half of the relative distance up to which experts count as close.
    """

    score: GateScore
    normalize: bool = False
    scale: float = 1.0
    jitter: float = 0.0

    def gates(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the gates of chosen experts, differentiable in ``logits``; where not chosen, the result means nothing.

        Args:
            logits: router logits, fp32 [..., E].
            mask: chosen experts, bool [..., E].

        Returns:
            fp32 [..., E].
        """
        if self.score == "sparsemixer":
            return self.scale * self._sparsemixer(logits, mask)
        if not self.normalize:
            return self.scale * (logits.softmax(-1) if self.score == "softmax" else logits.sigmoid())
        if self.score == "softmax":  # over the chosen ones alone, which is the same and cannot underflow
            some = mask.any(-1, keepdim=True)
            return self.scale * torch.where(some, logits.masked_fill(~mask, -torch.inf), 0.0).softmax(-1)
        scores = logits.sigmoid()
        return self.scale * scores / torch.where(mask, scores, 0.0).sum(-1, keepdim=True).clamp_min(1e-20)

    def _sparsemixer(self, logits: Tensor, mask: Tensor) -> Tensor:
        chosen_first = torch.where(mask, logits, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        remaining, gates = torch.ones_like(mask), torch.zeros_like(logits)
        for rank in range(int(mask.sum(-1).max()) if mask.numel() else 0):
            expert = chosen_first[..., rank : rank + 1]
            own = logits.gather(-1, expert)
            distance = (own - logits) / torch.maximum(logits.abs(), own).clamp_min(1e-30)
            close = remaining & (distance <= 2 * self.jitter)
            gate = 1 / torch.where(close, (logits - own).exp(), 0.0).sum(-1, keepdim=True)
            gates = gates.scatter(-1, expert, gate)
            remaining = remaining.scatter(-1, expert, False)
        return gates
