"""Two routing rules of one's own in a file beside the experiment: one from scratch, one derived from a shipped rule.

    python -m lightning_moe fit --config my_rule.yaml

runs the first from this folder, with the statistics, checkpoints, metrics and strategies that every rule has. The other
commands know them as well; what a rule cannot do, it says itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.routing import ExpertThreshold, Phase, PooledStatistics, RoutingRule, RoutingState, Selection


@dataclass(frozen=True)
class TopP(RoutingRule):
    """Each token goes to the fewest experts whose softmax probabilities sum to p (arXiv 2403.07652).

    Sure tokens use few experts, unsure ones many. p is stored and moves by a fixed step after each optimizer step, so
    that the mean over tokens tends to the model's ``num_experts_per_token``, as for the rules it is compared with.

    It declares no ``causal_choice``, because a sum of probabilities is none of those that `CausalChoice` lists. So
    it cannot be exported, and has no thresholds to calibrate.

    State: ``probability`` fp32 [], p.

    Args:
        step_size: how far p moves.
    """

    step_size: float = 0.01

    def initial_state(self, num_experts: int, num_experts_per_token: float) -> Mapping[str, Tensor]:
        return {"probability": torch.tensor(num_experts_per_token / num_experts)}

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        ordered = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)  # [B, S, E]
        before = ordered.values.cumsum(-1) - ordered.values  # probability of the better experts
        chosen = before < state["probability"]
        return Selection(torch.zeros_like(chosen).scatter(-1, ordered.indices, chosen))

    def update(self, state: RoutingState, statistics: PooledStatistics) -> None:
        experts_per_token = statistics.load.sum() / statistics.num_tokens  # over all ranks and accumulation steps
        direction = (state.num_experts_per_token - experts_per_token).sign()
        state["probability"].add_(self.step_size * direction).clamp_(0.01, 0.99)


@dataclass(frozen=True)
class FlooredThreshold(ExpertThreshold):
    """Expert Threshold routing whose thresholds never fall below a floor, so that no expert takes every token.

    It chooses as its parent does, so everything that its parent declares still holds.

    Args:
        floor: the lowest threshold.
    """

    floor: float = 0.0

    def update(self, state: RoutingState, statistics: PooledStatistics) -> None:
        super().update(state, statistics)
        state["threshold"].clamp_(min=self.floor)
