"""Rules that break the contract of the causal phase, each in its own way."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.routing import Phase, RoutingRule, RoutingState, Selection


@dataclass(frozen=True)
class BatchMean(RoutingRule):
    """The threshold is the mean of the batch's logits."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        return Selection(logits > logits.mean((0, 1)))


@dataclass(frozen=True)
class LastToken(RoutingRule):
    """Every token's threshold is the logit of the last token of its sequence."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        return Selection(logits >= logits[:, -1:])


@dataclass(frozen=True)
class NextToken(RoutingRule):
    """A token is routed by the logits of the one after it; the last by its own."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        following = torch.cat([logits[:, 1:], logits[:, -1:]], dim=1)
        return Selection(following > 0)


@dataclass(frozen=True)
class LastButOne(RoutingRule):
    """Only the last token but one looks ahead, at the last."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        mask = logits > 0
        mask[:, -2:-1] = logits[:, -1:] > 0
        return Selection(mask)


@dataclass(frozen=True)
class NeighbourSequence(RoutingRule):
    """The threshold is the logit at the same position of the sequence before in the batch."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        return Selection(logits >= logits.roll(1, dims=0))


@dataclass(frozen=True)
class BatchSize(RoutingRule):
    """Only the number of sequences of the batch counts, not what they are."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        return Selection(logits > 0.1 * logits.shape[0])


@dataclass(frozen=True)
class FirstOfPass(RoutingRule):
    """The first token of a pass goes to every expert: causal in a full pass, wrong in every step of decoding."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        mask = logits > 0
        mask[:, 0] = True
        return Selection(mask)
