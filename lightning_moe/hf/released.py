"""The rule of a released model: top-k of its scores, with its selection bias and its limit on groups of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.routing import Phase, RoutingRule, RoutingState, Selection

#: how a router makes scores of its logits: over all experts, or each expert by itself
Score = Literal["softmax", "sigmoid"]
#: the score of a group of experts: that of its best expert (DeepSeek-V2), or the sum of its two best (DeepSeek-V3)
GroupScore = Literal["max", "top2"]


@dataclass(frozen=True)
class ReleasedTopK(RoutingRule):
    """The ``num_experts_per_token`` experts with the highest score plus ``state["selection_bias"]``.

    Args:
        score: scores that the bias is added to.
        num_groups: number of equal groups of neighbouring experts.
        num_kept_groups: number of groups that a token may choose from.
        group_score: score by which groups are kept.
    """

    score: Score = "softmax"
    num_groups: int = 1
    num_kept_groups: int = 1
    group_score: GroupScore = "max"

    def initial_state(self, num_experts: int, num_experts_per_token: float) -> Mapping[str, Tensor]:
        return {"selection_bias": torch.zeros(num_experts)}

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        k = int(state.num_experts_per_token)
        chosen = self.choice_scores(logits, state["selection_bias"]).topk(k, dim=-1).indices
        mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)
        return Selection(mask, max_pairs=k * logits.shape[0] * logits.shape[1])

    def choice_scores(self, logits: Tensor, bias: Tensor) -> Tensor:
        """Return the scores whose top-k is chosen, fp32 [..., E]; −inf in groups that are not kept.

        Args:
            logits: router logits, fp32 [..., E].
            bias: selection bias, fp32 [E].
        """
        scores = (logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()) + bias
        if self.num_kept_groups == self.num_groups:
            return scores
        groups = scores.view(*scores.shape[:-1], self.num_groups, -1)
        best = groups.amax(-1) if self.group_score == "max" else groups.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept.scatter_(-1, best.topk(self.num_kept_groups, dim=-1).indices, True)
        limited: Tensor = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
        return limited

    def set_inference_num_experts_per_token(self, state: RoutingState, value: float) -> None:
        most = self.most(state.num_experts)
        if value != int(value) or value > most:
            raise UserError(
                f"inference_num_experts_per_token={value:g}: the model's own top-k sends every token to the same "
                f"number of experts, so it must be a whole number, at most {most}."
            )
        state.num_experts_per_token = value

    def most(self, num_experts: int) -> int:
        """Return the largest number of experts that a token may choose among ``num_experts``."""
        return num_experts * self.num_kept_groups // self.num_groups
