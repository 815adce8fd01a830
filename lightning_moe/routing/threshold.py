"""The stored threshold of each expert: a bias-corrected moving average of the pooled k-th largest logit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.routing.base import PooledStatistics, RoutingRule, RoutingState


@dataclass(frozen=True)
class ThresholdTracking(RoutingRule):
    """Shared by the rules that track thresholds (expert choice and expert threshold).

    State: ``threshold_ema`` fp32 [E], the raw average c ← β c + (1−β) cutoff, started at 0 (paper, Algorithm 1);
    ``num_updates`` int64 []; ``threshold`` fp32 [E], what the forward pass reads: c / (1 − βⁿ), as in Adam;
    ``cutoff`` fp32 [E], the k-th largest logit of the last global batch.

    Before the first update ``threshold`` is the normal quantile of the target rate: a fresh router has N(0, 1) logits
    (rows N(0, 1/d) against an input of unit mean square), so that no expert starts flooded.

    Args:
        ema_decay: decay β per optimizer step; its memory is 1/(1−β) steps (paper: 0.999 over ~20,000 steps).
    """

    ema_decay: float = 0.99

    pools_cutoff = True

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"model.routing.ema_decay={self.ema_decay!r}: must be at least 0 and below 1.")

    def initial_state(self, num_experts: int, num_experts_per_token: float) -> Mapping[str, Tensor]:
        rate = min(num_experts_per_token / num_experts, 1 - 1e-6)
        prior = NormalDist().inv_cdf(1 - rate)
        return {
            "threshold": torch.full((num_experts,), prior, dtype=torch.float32),
            "threshold_ema": torch.zeros(num_experts, dtype=torch.float32),
            "cutoff": torch.full((num_experts,), prior, dtype=torch.float32),
            "num_updates": torch.zeros((), dtype=torch.int64),
        }

    def update(self, state: RoutingState, statistics: PooledStatistics) -> None:
        assert statistics.cutoff is not None
        decay = self.ema_decay
        state["cutoff"].copy_(statistics.cutoff)
        state["threshold_ema"].mul_(decay).add_(statistics.cutoff, alpha=1 - decay)
        state["num_updates"].add_(1)
        correction = 1 - decay ** state["num_updates"].double()
        state["threshold"].copy_(state["threshold_ema"].double() / correction)
