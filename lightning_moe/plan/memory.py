"""Memory of one device: its parameters, gradients, optimizer state and activations under each strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from lightning_moe.model import DecoderConfig
from lightning_moe.model.expert_parallel import check_group_size
from lightning_moe.optim import OptimizerConfig, build_optimizer
from lightning_moe.plan.saved import SavedActivations, build
from lightning_moe.routing import RoutingRule

Strategy = Literal["single", "ddp", "fsdp", "expert_parallel"]
#: strategies that a plan compares
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

#: tensors of a parameter's shape that its rule keeps
_STATES = {"muon": 1, "adamw": 2}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Args:
        parameters: share of this device.
        gradients: share of this device; they exist in every pass but the first of a step.
        optimizer: Muon's momentum, AdamW's two moments.
        communication: DDP's buckets; or under FSDP2 the gathered embedding and head and the block that is gathered
            when the backward pass begins.
        communication_checkpointed: communication with ``model.decoder.activation_checkpointing``. The peak then lies
            inside the backward pass: two gathered blocks (one in use, one on its way) and the largest unsharded
            gradient.
        activations: what is kept for the backward pass, and what the loss takes meanwhile (`SavedActivations.peak`).
        activations_checkpointed: activations with ``model.decoder.activation_checkpointing``.
    """

    parameters: int
    gradients: int
    optimizer: int
    communication: int
    communication_checkpointed: int
    activations: int
    activations_checkpointed: int

    def total(self, checkpointing: bool) -> int:
        """Return the sum: a bound for a pass that accumulates, without what kernels take while they run."""
        fixed = self.parameters + self.gradients + self.optimizer
        if checkpointing:
            return fixed + self.communication_checkpointed + self.activations_checkpointed
        return fixed + self.communication + self.activations


def memory_plan(
    config: DecoderConfig,
    rule: RoutingRule | None,
    optimizer: OptimizerConfig,
    saved: SavedActivations,
    precision: str,
    strategy: Strategy,
    num_devices: int,
    expert_parallel_size: int = 1,
) -> MemoryPlan:
    """Count the bytes of a run on one device, on the meta device.

    Args:
        config: the decoder.
        rule: the routing rule; `None` for the dense model.
        optimizer: rules that decide how much state each parameter has.
        saved: activations of one device's micro-batch.
        precision: one of ``saved.PRECISIONS``.
        strategy: ``single`` and ``ddp`` have everything on each device, ``fsdp`` shards everything over the devices,
            ``expert_parallel`` also leaves the experts where they are.
        num_devices: number of devices of the run.
        expert_parallel_size: number of devices that share the experts, under ``expert_parallel``.

    Raises:
        UserError: the size of a group does not divide the devices or the experts.
    """
    group = 1
    if strategy == "expert_parallel":
        group = expert_parallel_size
        check_group_size(group, "--num_gpus", num_devices)
        check_group_size(group, "model.decoder.num_experts", config.num_experts)
    with torch.device("meta"):
        model = build(config, rule, precision)
    weights = sum(map(_bytes, model.parameters()))
    states = sum(
        _STATES[settings["rule"]] * _bytes(parameter)
        for settings in build_optimizer(model, optimizer).param_groups
        for parameter in settings["params"]
    )
    share = num_devices if strategy in ("fsdp", "expert_parallel") else 1
    communication = inside = weights if strategy == "ddp" else 0
    if share > 1:
        experts = {id(p) for moe in model.moe_layers() for p in moe.experts.parameters()}
        replicated = 0 if group == num_devices else 1 / group  # of an expert; where no other device has it, it stays
        gathered = sorted(_gathered(block, experts, 1 if group == 1 else replicated) for block in model.blocks)
        root = weights - sum(_gathered(block, experts, 1) for block in model.blocks)
        inside = root + sum(gathered[-2:]) + max(root, gathered[-1])
        # By the backward pass of the last block the loss has freed this; gradients take the place of the block's own.
        freed = saved.head + saved.workspace
        communication = max(root + gathered[-1], inside - freed)
    return MemoryPlan(
        -(-weights // share),
        -(-weights // share),
        -(-states // share),
        communication,
        inside,
        saved.peak(False, group),
        saved.peak(True, group),
    )


def _gathered(block: nn.Module, experts: set[int], share: float) -> int:
    """Return the bytes of a block's parameters that one device gathers to compute: all, and a share of the experts."""
    return sum(round(_bytes(p) * (share if id(p) in experts else 1)) for p in block.parameters())


def _bytes(parameter: torch.Tensor) -> int:
    return parameter.numel() * parameter.element_size()
