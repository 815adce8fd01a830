"""The k best experts of each token."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moe.routing.opaque import opaque


def _empty_mask(scores: Tensor, k: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


@opaque(_empty_mask)
def top_experts_mask(scores: Tensor, k: int) -> Tensor:
    """Mark the k highest scores of each token: fp32 [..., E] → bool [..., E]; ties go to the lower index."""
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
