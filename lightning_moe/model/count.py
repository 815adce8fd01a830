"""Parameters and FLOPs of a decoder, counted from its config without allocating weights."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from lightning_moe.errors import UserError
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
    """Count the parameters and FLOPs of a decoder, on the meta device.

    Raises:
        UserError: a weight has more elements than torch can count.
    """
    with torch.device("meta"):
        try:
            model = Decoder(config, rule)
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            raise UserError(f"model.decoder: a weight of these sizes has more elements than 2**63: {config}") from error
    total = sum(parameter.numel() for parameter in model.parameters())
    inactive = 0.0
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    for module, rate in zip(experts, config.rates_per_layer[config.num_dense_layers :], strict=False):
        inactive += sum(p.numel() for p in module.parameters()) * (1 - rate / config.num_experts)
    active = round(total - inactive)
    look_up = 0 if config.tie_embeddings else model.embedding.weight.numel()
    attention = 6 * config.num_layers * config.hidden_size * config.max_sequence_length
    return ModelSize(total, active, 6 * (active - look_up) + attention)


def check_memory(size: ModelSize) -> None:
    """Refuse a model whose weights alone, in fp32, do not fit into the memory of this machine, where it is built.

    Raises:
        UserError: with the arithmetic.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = 4 * size.total_parameters
    if needed > memory:
        raise UserError(
            f"model.decoder: {size.total_parameters:,} parameters take {needed / 2**30:,.1f} GiB in fp32, but this "
            f"machine has {memory / 2**30:,.1f} GiB of memory; make the model smaller (`plan` tells what a run takes)"
        )
