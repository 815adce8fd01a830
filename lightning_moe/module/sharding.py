"""A decoder over the processes of FSDP2, and the numbers of optimizer states that are the same under every strategy."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_moe.checkpoints.sharded import PARAMETER_NUMBERS
from lightning_moe.model import Decoder
from lightning_moe.model.expert_parallel import distribute_experts


def shard(decoder: Decoder, mesh: DeviceMesh, expert_mesh: DeviceMesh | None) -> None:
    """Shard the parameters of a decoder over the data-parallel processes, and its experts over a mesh of their own.

    Args:
        decoder: decoder with whole parameters.
        mesh: mesh of all processes, with a dimension ``data_parallel``.
        expert_mesh: mesh for experts, see `distribute_experts`; `None` shards them like the rest.
    """
    for layer in decoder.moe_layers():
        if expert_mesh is not None:
            distribute_experts(layer.experts, expert_mesh)
        # alone: fp32 cannot share a group with the rest under ``bf16-true``
        fully_shard(layer.router, mesh=mesh["data_parallel"])
    for block in decoder.blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(decoder, mesh=mesh["data_parallel"])


def number_by_parameters(module: pl.LightningModule, decoder: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Number the optimizer's states in a checkpoint in the order of ``parameters()`` instead of that of its groups.

    Lightning's FSDP2 loader assumes that order; torch's own loader accepts any. So a checkpoint of any strategy
    continues under any other. A sharded checkpoint, which names them, records that order.
    """
    position = {parameter: index for index, parameter in enumerate(module.parameters())}
    if isinstance(decoder, FSDPModule):  # Lightning has numbered them so
        number = {name: position[value] for name, value in module.named_parameters(remove_duplicate=False)}
        checkpoint[PARAMETER_NUMBERS] = {name: number.get(name) for name in module.state_dict()}
        return
    for optimizer, state in zip(module.trainer.optimizers, checkpoint.get("optimizer_states", []), strict=False):
        order = [position[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        state["state"] = {order[index]: entry for index, entry in state["state"].items()}
        for group in state["param_groups"]:
            group["params"] = [order[index] for index in group["params"]]
