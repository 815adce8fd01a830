"""Parameters and FLOPs of a decoder, counted from its config without allocating weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_moe.model.config import DecoderConfig
from lightning_moe.model.decoder import Decoder
from lightning_moe.model.experts import Experts
from lightning_moe.routing.base import RoutingRule


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a decoder, and FLOPs of one training token.

    Args:
        total_parameters: number of all parameters; a tied matrix counts once.
        active_parameters: number of those that one token uses at the target rate: of the routed experts the share
            ``num_experts_per_token / num_experts``, everything else in full (embedding and head included).
        flops_per_token: FLOPs of one training token (forward + backward) on active parameters: 6 per active matrix
            weight (the embedding look-up is none) + 6 · layers · hidden_size · max_sequence_length for causal
            attention scores and values (the mean context is half the window).
    """

    total_parameters: int
    active_parameters: int
    flops_per_token: int


def model_size(config: DecoderConfig, rule: RoutingRule | None) -> ModelSize:
    """Count the parameters and FLOPs of a decoder, on the meta device."""
    with torch.device("meta"):
        model = Decoder(config, rule)
    total = sum(parameter.numel() for parameter in model.parameters())
    inactive = 0.0
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    for module, rate in zip(experts, config.rates_per_layer[config.num_dense_layers :], strict=False):
        inactive += sum(p.numel() for p in module.parameters()) * (1 - rate / config.num_experts)
    active = round(total - inactive)
    look_up = 0 if config.tie_embeddings else model.embedding.weight.numel()
    attention = 6 * config.num_layers * config.hidden_size * config.max_sequence_length
    return ModelSize(total, active, 6 * (active - look_up) + attention)
