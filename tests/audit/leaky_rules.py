"""Rules that break the contract of the causal phase, each in its own way."""

from collections.abc import Mapping
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


@dataclass(frozen=True)
class CalibratesItself(RoutingRule):
    """The first pass sets the thresholds to the means of its batch; later passes only read them."""

    def initial_state(self, num_experts: int, num_experts_per_token: float) -> Mapping[str, Tensor]:
        return {"threshold": torch.zeros(num_experts), "calibrated": torch.zeros(1)}

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        if not state["calibrated"]:
            state["threshold"].copy_(logits.mean((0, 1)))
            state["calibrated"].fill_(1)
        return Selection(logits > state["threshold"])


@dataclass(frozen=True)
class BonusInFirstPass(RoutingRule):
    """Every token takes one expert more in the first pass, and it is the same for all tokens of all texts."""

    def initial_state(self, num_experts: int, num_experts_per_token: float) -> Mapping[str, Tensor]:
        return {"passes": torch.zeros(1)}

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        mask = logits > 0
        mask[..., 0] |= state["passes"] == 0
        state["passes"].add_(1)
        return Selection(mask)


@dataclass(frozen=True)
class CountsOnItself(RoutingRule):
    """What it remembers is in no buffer, but in an attribute of the rule."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        object.__setattr__(self, "passes", getattr(self, "passes", 0) + 1)
        return Selection(logits > 0)


PASSES: list[int] = []


@dataclass(frozen=True)
class CountsInItsFile(RoutingRule):
    """What it remembers is in no object of the model, but in a variable of its file."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        PASSES.append(1)
        return Selection(logits > 0)


@dataclass(frozen=True)
class DrawsLots(RoutingRule):
    """One choice in ten is a random one."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        return Selection(torch.where(torch.rand(logits.shape) < 0.1, torch.rand(logits.shape) < 0.5, logits > 0))


@dataclass(frozen=True)
class RareToken(RoutingRule):
    """One token in 20,000 is routed by the logits of the token after it."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        rare = (logits[..., :1] * 1e6).long() % 20_000 == 7
        return Selection(torch.where(rare, logits.roll(-1, dims=1) > 0, logits > 0))


@dataclass(frozen=True)
class LongSequence(RoutingRule):
    """Looks at the last token of sequences of 500 tokens or more."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        return Selection(logits > (logits[:, -1:] if logits.shape[1] >= 500 else 0))


@dataclass(frozen=True)
class LargeBatch(RoutingRule):
    """Looks at the mean of batches of 100 sequences or more."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        return Selection(logits > (logits.mean((0, 1)) if logits.shape[0] >= 100 else 0))


@dataclass(frozen=True)
class WritesToLogits(RoutingRule):
    """The choice is causal, but the logits that the gates are made of become relative to the last token's."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        mask = logits > 0
        logits -= 0.5 * logits[:, -1:].clone()
        return Selection(mask)


@dataclass(frozen=True)
class SeesPadding(RoutingRule):
    """The threshold is the share of the sequence that repeats its last token: 0 where nothing is padded."""

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        repeats = (logits[:, 1:] - logits[:, :-1]).abs().amax(-1, keepdim=True) < 1e-3
        return Selection(logits > repeats.float().mean(1, keepdim=True))
