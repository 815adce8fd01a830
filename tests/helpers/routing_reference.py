"""Slow, obvious versions of the routing rules and of the MoE layer (Eq. 2), in Python loops and float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.model import MoELayer
from lightning_moe.routing import (
    ExpertChoice,
    ExpertThreshold,
    Phase,
    QuantileBalancing,
    RoutingRule,
    RoutingState,
    TokenChoice,
    TokenChoiceAuxLoss,
    TokenChoiceLossFree,
)

#: every rule of the package in every phase that its options make different
RULES_AND_PHASES = [
    (TokenChoice(), Phase.TRAIN),
    (TokenChoice(), Phase.CAUSAL),
    (TokenChoiceAuxLoss(), Phase.TRAIN),
    (TokenChoiceLossFree(), Phase.TRAIN),
    (TokenChoiceLossFree(), Phase.CAUSAL),
    (QuantileBalancing(), Phase.TRAIN),
    (QuantileBalancing(), Phase.CAUSAL),
    (ExpertChoice(), Phase.TRAIN),
    (ExpertChoice(pool="sequence"), Phase.TRAIN),
    (ExpertChoice(), Phase.CAUSAL),
    (ExpertThreshold(), Phase.WARMUP),
    (ExpertThreshold(), Phase.TRAIN),
    (ExpertThreshold(capacity_factor=0.25), Phase.TRAIN),
    (ExpertThreshold(capacity_factor=None), Phase.TRAIN),
    (ExpertThreshold(), Phase.CAUSAL),
]
RULES = [
    TokenChoice(),
    TokenChoiceAuxLoss(),
    TokenChoiceLossFree(),
    QuantileBalancing(),
    ExpertChoice(),
    ExpertChoice(pool="sequence"),
    ExpertThreshold(),
]


def name_of(value: object) -> str:
    """For parametrised test ids."""
    if isinstance(value, RoutingRule):
        options = [f"{key}={option}" for key, option in vars(value).items()]
        return "-".join([type(value).__name__, *options])
    return value.name if isinstance(value, Phase) else str(value)


def make_state(rule: RoutingRule, num_experts: int, num_experts_per_token: float) -> RoutingState:
    """A state away from its initial values, so that reading the wrong buffer shows."""
    state = RoutingState(rule, num_experts, num_experts_per_token)
    spread = torch.linspace(-1.2, 1.5, num_experts)
    if "threshold" in state:
        state["threshold"].copy_(spread.flip(0))
    if "selection_bias" in state:
        state["selection_bias"].copy_(spread)
    if "load_fraction" in state:
        state["load_fraction"].copy_(spread.abs())
    return state


def reference_mask(rule: RoutingRule, logits: Tensor, state: RoutingState, phase: Phase) -> Tensor:
    """bool [B, S, E] from logits [B, S, E], one decision at a time."""
    batch, length, num_experts = logits.shape
    r = logits.tolist()
    mask = torch.zeros(batch, length, num_experts, dtype=torch.bool)
    tokens = [(b, s) for b in range(batch) for s in range(length)]

    def choose(pool: list[tuple[int, int]], expert: int, count: int) -> None:
        by_score = sorted(pool, key=lambda token: (-r[token[0]][token[1]][expert], token))
        for b, s in by_score[:count]:
            mask[b, s, expert] = True

    if isinstance(rule, TokenChoice):
        bias = state["selection_bias"].tolist() if "selection_bias" in state else [0.0] * num_experts
        if isinstance(rule, QuantileBalancing):  # in fp32, so that the same scores tie
            r, bias = (logits.sigmoid() + state["selection_bias"]).tolist(), [0.0] * num_experts
        for b, s in tokens:
            by_score = sorted(range(num_experts), key=lambda i: (-(r[b][s][i] + bias[i]), i))
            for i in by_score[: int(state.num_experts_per_token)]:
                mask[b, s, i] = True
        return mask

    expert_chooses = phase is Phase.WARMUP or (isinstance(rule, ExpertChoice) and phase is Phase.TRAIN)
    for i in range(num_experts):
        if expert_chooses:
            per_sequence = isinstance(rule, ExpertChoice) and rule.pool == "sequence"
            pools = [[t for t in tokens if t[0] == b] for b in range(batch)] if per_sequence else [tokens]
            for pool in pools:
                choose(pool, i, max(1, math.floor(len(pool) * state.rate + 0.5)))
            continue
        above = [t for t in tokens if r[t[0]][t[1]][i] > state["threshold"][i].item()]
        count = len(above)
        if isinstance(rule, ExpertThreshold) and phase is Phase.TRAIN and rule.capacity_factor is not None:
            k = len(tokens) * state.rate
            upper = min(len(tokens), math.floor((1 + rule.capacity_factor) * k))
            lower = min(upper, max(0, math.ceil((1 - rule.capacity_factor) * k)))
            count = min(max(count, lower), upper)
        choose(tokens, i, count)
    return mask


@dataclass
class ReferenceMoE:
    """The layer's weights in float64, ready for gradients."""

    weights: dict[str, Tensor]

    @classmethod
    def of(cls, layer: MoELayer) -> ReferenceMoE:
        return cls({name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()})

    def logits(self, x: Tensor) -> Tensor:
        w = self.weights["router.weight"]
        if "router.scale" not in self.weights:
            return torch.stack([torch.stack([w @ token for token in sequence]) for sequence in x])
        unit = lambda v: v / v.norm()  # noqa: E731
        rows = torch.stack([unit(row) for row in w])
        return self.weights["router.scale"] * torch.stack(
            [torch.stack([rows @ unit(token) for token in sequence]) for sequence in x]
        )

    def expert(self, i: int, x: Tensor) -> Tensor:
        """x [D] through expert i: weights are [D, F] and [F, D]."""
        up = x @ self.weights["experts.up"][i]
        gate = x @ self.weights["experts.gate"][i] if "experts.gate" in self.weights else None
        return self._hidden(up, gate) @ self.weights["experts.down"][i]

    def shared(self, x: Tensor) -> Tensor:
        """x [D] through the shared expert: weights are [F, D] and [D, F], as in nn.Linear."""
        if "shared_expert.up.weight" not in self.weights:
            return 0 * x
        up = self.weights["shared_expert.up.weight"] @ x
        gate = self.weights["shared_expert.gate.weight"] @ x if "shared_expert.gate.weight" in self.weights else None
        return self.weights["shared_expert.down.weight"] @ self._hidden(up, gate)

    @staticmethod
    def _hidden(up: Tensor, gate: Tensor | None) -> Tensor:
        return up.clamp_min(0) ** 2 if gate is None else up * gate * torch.sigmoid(gate)

    def forward(self, x: Tensor, mask: Tensor, gate: str, normalize: bool) -> Tensor:
        """y_t = shared(x_t) + Σ_i z_{t,i} p_{t,i} expert_i(x_t), [B, S, D]."""
        logits = self.logits(x)
        rows = []
        for b in range(x.shape[0]):
            for s in range(x.shape[1]):
                r = logits[b, s]
                p = 1 / (1 + torch.exp(-r)) if gate == "sigmoid" else torch.exp(r) / torch.exp(r).sum()
                chosen = [i for i in range(len(r)) if mask[b, s, i]]
                total = sum(p[i] for i in chosen) if normalize else 1.0
                y = self.shared(x[b, s])
                for i in chosen:
                    y = y + p[i] / total * self.expert(i, x[b, s])
                rows.append(y)
        return torch.stack(rows).view_as(x)
