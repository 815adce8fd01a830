"""Token choice (TC): each token goes to its k best experts, with the field's ways to balance the load.

The compute per token is fixed, and the choice is causal. The load is balanced by an auxiliary loss (Switch; over the
global batch, Qiu et al. 2025) or by a bias per expert that acts on the selection alone (Wang et al. 2024, "loss-free").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.routing.base import CausalChoice, Phase, PooledStatistics, RoutingRule, RoutingState, Selection
from lightning_moe.routing.top_experts import top_experts_mask


@dataclass(frozen=True)
class TokenChoice(RoutingRule):
    """Top-k experts of each token, without balancing. Among equal scores the expert with the lower index wins."""

    causal_choice = CausalChoice.TOP_K

    def check(self, num_experts: int, num_experts_per_token: float) -> None:
        if num_experts_per_token != int(num_experts_per_token):
            raise UserError(
                f"model.decoder.num_experts_per_token={num_experts_per_token!r}: {type(self).__name__} sends every "
                "token to the same number of experts, so it must be a whole number."
            )

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        k, num_tokens = int(state.num_experts_per_token), logits.shape[0] * logits.shape[1]
        return Selection(top_experts_mask(self.selection_scores(logits, state), k), max_pairs=k * num_tokens)

    def set_inference_num_experts_per_token(self, state: RoutingState, value: float) -> None:
        if value != int(value):
            raise UserError(
                f"inference_num_experts_per_token={value:g}: {type(self).__name__} sends every token to the same "
                "number of experts, so it must be a whole number."
            )
        state.num_experts_per_token = value

    def selection_scores(self, logits: Tensor, state: RoutingState) -> Tensor:
        """Return the scores [B, S, E] whose top-k is taken; gates always come from the logits alone."""
        return logits


@dataclass(frozen=True)
class TokenChoiceAuxLoss(TokenChoice):
    """Token choice with the auxiliary loss α Σ_i f_i P_i over the global batch.

    f_i = (E / k) · share of tokens sent to expert i, so f_i = 1 for a balanced load. P_i is a mean over tokens, of
    σ(r_i) / Σ_j σ(r_j) (`normalized`, as in Switch), or of σ(r_i) (as in the Expert Threshold paper). These are two
    baselines: at the same α the gradient of the second is some 16 times larger for 16 experts, and it points elsewhere,
    because it also lowers all logits of a token together.

    f carries no gradient. The state keeps that of the *previous* global batch, because the current one is not known
    before its last micro-batch has run. So the loss does not depend on how the batch is split over ranks and
    accumulation steps. Before the first update f_i = 1 (the normalised loss then exerts no pressure).

    State: ``load_fraction`` fp32 [E], f.

    Args:
        aux_loss_coef: coefficient α.
        normalized: whether the gates of a token are divided by their sum in P.
    """

    aux_loss_coef: float = 0.001
    normalized: bool = True

    def initial_state(self, num_experts: int, num_experts_per_token: float) -> Mapping[str, Tensor]:
        return {"load_fraction": torch.ones(num_experts, dtype=torch.float32)}

    def update(self, state: RoutingState, statistics: PooledStatistics) -> None:
        scale = state.num_experts / (state.num_experts_per_token * statistics.num_tokens)
        state["load_fraction"].copy_(statistics.load * scale)

    def aux_loss(self, logits: Tensor, state: RoutingState) -> Tensor:
        gates = logits.sigmoid()
        if self.normalized:
            gates = gates / gates.sum(-1, keepdim=True)
        return self.aux_loss_coef * (state["load_fraction"] * gates.mean((0, 1))).sum()


@dataclass(frozen=True)
class TokenChoiceLossFree(TokenChoice):
    """Token choice by r + b, gated by r alone; b ← b + u · sign(mean load − load), then centred to zero mean.

    Each optimizer step updates b from the global batch's counts.

    State: ``selection_bias`` fp32 [E], b.

    Args:
        bias_update_rate: step size u.
    """

    bias_update_rate: float = 0.005

    def initial_state(self, num_experts: int, num_experts_per_token: float) -> Mapping[str, Tensor]:
        return {"selection_bias": torch.zeros(num_experts, dtype=torch.float32)}

    def selection_scores(self, logits: Tensor, state: RoutingState) -> Tensor:
        return logits + state["selection_bias"]

    def update(self, state: RoutingState, statistics: PooledStatistics) -> None:
        load = statistics.load.double()
        bias = state["selection_bias"]
        bias.add_(self.bias_update_rate * (load.mean() - load).sign().float())
        bias.sub_(bias.mean())
