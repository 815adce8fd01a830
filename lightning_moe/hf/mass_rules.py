"""Rules of the literature that give tokens different numbers of experts by their probabilities: top-p and min-p.

The probabilities are the scores by which the released model ranks its experts (with its selection bias, and 0 in groups
that it leaves out), divided by their sum. For a softmax router without a bias they are that softmax. Both rules look at
one token alone, so they are causal. Neither balances the load.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_moe.hf.released import ReleasedTopK
from lightning_moe.routing import Phase, RoutingRule, RoutingState, Selection


@dataclass(frozen=True)
class MassRule(RoutingRule):
    """Base of the two rules: a token takes the experts whose score is at least that of the layer's cutoff.

    State: ``selection_bias`` fp32 [E], that of the released choice; ``p`` fp32 [], the parameter, which begins where
    every expert is chosen.

    Args:
        released: rule of the released model.
    """

    released: ReleasedTopK = field(default_factory=ReleasedTopK)

    shares_cutoff = True

    def initial_state(self, num_experts: int, num_experts_per_token: float) -> Mapping[str, Tensor]:
        return {**self.released.initial_state(num_experts, num_experts_per_token), "p": torch.tensor(self.all_experts)}

    def probabilities(self, logits: Tensor, state: RoutingState) -> Tensor:
        """Return the probabilities of the experts, fp32 [..., E], for router logits of that shape."""
        scores = self.released.choice_scores(logits, state["selection_bias"]).clamp_min(0)
        return scores / scores.sum(-1, keepdim=True)

    @property
    @abstractmethod
    def all_experts(self) -> float:
        """Value of p at which every expert is chosen."""

    @abstractmethod
    def pool_scores(self, logits: Tensor, state: RoutingState) -> Tensor:
        """Return scores [..., E] such that the experts above a cutoff are those that some p chooses."""


@dataclass(frozen=True)
class TopP(MassRule):
    """The smallest set of experts whose probabilities reach p (arXiv 2403.07652): at least the best one."""

    @property
    def all_experts(self) -> float:
        return 2.0  # 1 may be reached before the last expert, by rounding

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        return Selection(-self.pool_scores(logits, state) < state["p"])

    def pool_scores(self, logits: Tensor, state: RoutingState) -> Tensor:
        """Return minus the probability of all experts that come before, from 0 down to −1."""
        best_first = self.probabilities(logits, state).sort(dim=-1, descending=True, stable=True)
        before = best_first.values.cumsum(-1).roll(1, dims=-1)
        before[..., 0] = 0
        return torch.zeros_like(before).scatter(-1, best_first.indices, -before)

    def set_thresholds(self, state: RoutingState, cutoffs: Tensor) -> None:
        most = -cutoffs[0, 0]  # before an expert that is still chosen, so p is the next number above it
        state["p"].copy_(torch.nextafter(most, torch.tensor(torch.inf)))


@dataclass(frozen=True)
class MinP(MassRule):
    """The experts whose probability is at least p times that of the token's best expert."""

    @property
    def all_experts(self) -> float:
        return 0.0

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        return Selection(self.pool_scores(logits, state) >= state["p"])

    def pool_scores(self, logits: Tensor, state: RoutingState) -> Tensor:
        """Return the probabilities over that of the best expert, from 0 to 1."""
        probabilities = self.probabilities(logits, state)
        return probabilities / probabilities.amax(-1, keepdim=True)

    def set_thresholds(self, state: RoutingState, cutoffs: Tensor) -> None:
        state["p"].copy_(cutoffs[0, 0])
