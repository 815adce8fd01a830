"""Parameters and FLOPs of a decoder, counted from its config without allocating weights."""

from __future__ import annotations

import os

import torch

from lightning_moe.errors import UserError
from lightning_moe.model.causal_lm import ModelSize
from lightning_moe.model.config import DecoderConfig
from lightning_moe.model.decoder import Decoder
from lightning_moe.routing.base import RoutingRule


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
    return model.size


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
