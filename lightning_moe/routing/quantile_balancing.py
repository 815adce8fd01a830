"""Quantile Balancing (QB; J. Su 2026; Kimi K3): token choice whose bias is computed to balance the load, not nudged.

With s = σ(r), a token goes to the k experts with the highest s + b. Which biases would have sent each of the n experts
its share q = N·k/n of the N tokens of the global batch? Token i takes expert j when s_ij + b_j is above its best score
that is not chosen, α_i = the (k+1)-th largest of s_i + b. So with all α held fixed, expert j gets exactly q tokens if
−b_j is the (q+1)-th largest of the margins s_ij − α_i over the batch:

    b_j ← − (q+1)-th largest of (s_ij − α_i),   then b ← b − mean(b).

There is no step size and no auxiliary loss. Each optimizer step sets b for the next, and inference keeps it. Without
the limit of k per token (no α) the same quantile is Expert Threshold routing: `ExpertThreshold` with ``ema_decay: 0``
and no capacity is QB's "dynamic" form, and with a decay its smoothed one (docs/routing.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.routing.base import CausalChoice, CutoffEstimator, PooledStatistics, RoutingState
from lightning_moe.routing.moving_average import MovingAverage
from lightning_moe.routing.token_choice import TokenChoice


@dataclass(frozen=True)
class QuantileBalancing(MovingAverage, TokenChoice):
    """Token choice by σ(r) + b, gated by r alone, with the bias from the pooled quantile of the margins.

    State: ``selection_bias`` fp32 [E], b, zero at first; ``ema_weight`` fp32 [], see `MovingAverage`.

    Args:
        ema_decay: decay per optimizer step of a moving average of the bias; 0 keeps the last batch's (Su, K3).
        ema_half_life_tokens: memory in tokens instead of ema_decay, see `MovingAverage`.
    """

    ema_decay: float = 0.0

    causal_choice = CausalChoice.TOP_K_OF_SIGMOID

    @property
    def cutoff_estimator(self) -> CutoffEstimator:
        return "next_largest"

    def initial_state(self, num_experts: int, num_experts_per_token: float) -> Mapping[str, Tensor]:
        return {"selection_bias": torch.zeros(num_experts, dtype=torch.float32), **self.initial_average()}

    def selection_scores(self, logits: Tensor, state: RoutingState) -> Tensor:
        return logits.sigmoid() + state["selection_bias"]

    def pool_scores(self, logits: Tensor, state: RoutingState) -> Tensor:
        """Return the margins s − α [..., E]; where every expert is chosen, α is the lowest score."""
        k = min(int(state.num_experts_per_token) + 1, state.num_experts)
        alpha = self.selection_scores(logits, state).topk(k, dim=-1).values[..., -1:]
        return logits.sigmoid() - alpha

    def update(self, state: RoutingState, statistics: PooledStatistics) -> None:
        assert statistics.cutoff is not None
        bias = statistics.cutoff.mean() - statistics.cutoff
        self.average(state, statistics.num_tokens, selection_bias=bias)
