"""Routing rules: pure functions of router logits and stored state. See docs/routing.md for what each computes."""

from lightning_moe.routing.base import (
    CausalChoice,
    Phase,
    PooledStatistics,
    RoutingRecord,
    RoutingRule,
    RoutingState,
    Selection,
    rule_from_config,
    target_count,
)
from lightning_moe.routing.expert_choice import ExpertChoice
from lightning_moe.routing.expert_threshold import ExpertThreshold
from lightning_moe.routing.quantile_balancing import QuantileBalancing
from lightning_moe.routing.token_choice import TokenChoice, TokenChoiceAuxLoss, TokenChoiceLossFree

__all__ = [
    "CausalChoice",
    "ExpertChoice",
    "ExpertThreshold",
    "Phase",
    "PooledStatistics",
    "QuantileBalancing",
    "RoutingRecord",
    "RoutingRule",
    "RoutingState",
    "Selection",
    "TokenChoice",
    "TokenChoiceAuxLoss",
    "TokenChoiceLossFree",
    "rule_from_config",
    "target_count",
]
