"""Expert parallelism: the experts of a layer live on different ranks, and tokens travel to them and back.

All ranks are data parallel. Every group of ranks holds each expert once, so a rank computes its experts for the tokens
of the whole group. The groups hold replicas, which FSDP2 shards over the groups. The parameters are distributed tensors
sharded along the expert dimension, so checkpoints gather and spread them like all others.

Shape letters: N tokens of this rank, E experts, P ranks of a group, L = E/P experts of a rank, M chosen token-expert
pairs of this rank's tokens, R pairs that this rank's experts receive, D hidden size, F hidden size of an expert.
A local name that ends in such letters has that shape: ``rows_RD``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_moe.errors import UserError
from lightning_moe.internals.torch import all_to_all_single, all_to_all_single_autograd, wait_tensor
from lightning_moe.model.pairs import Pairs, pairs_in_order
from lightning_moe.model.routed import routed_experts

#: names of the mesh's dimensions: replicas of an expert, and the ranks that share the experts of a layer
REPLICAS, EXPERTS = "expert_replicas", "expert_parallel"


def check_group_size(size: int, name: str, number: int) -> None:
    """Raise `UserError` unless ``size``, the ranks of a group, divides ``number``, called ``name`` in the message."""
    if size < 1 or number % size:
        raise UserError(f"trainer.strategy.init_args.expert_parallel_size={size}: must divide {name}={number}")


def distribute_experts(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Leave each rank its experts, in place. Every rank must hold the same weights, or they must be on the meta device.

    Args:
        experts: module whose parameters are stacks [E, …]; its ``forward`` takes `local_experts` of them.
        mesh: mesh of two dimensions, ``(REPLICAS, EXPERTS)``.

    Raises:
        UserError: the number of experts is not a multiple of the ranks of a group.
    """
    for name, stack in list(experts.named_parameters()):
        check_group_size(mesh[EXPERTS].size(), "model.decoder.num_experts", stack.shape[0])
        local = distribute_tensor(stack.detach(), mesh[EXPERTS], [Shard(0)], src_data_rank=None)
        setattr(experts, name, nn.Parameter(local, requires_grad=stack.requires_grad))
    fully_shard(experts, mesh=mesh[REPLICAS])


def local_experts(stack: Tensor) -> Tensor:
    """Return this rank's experts of a stack [E, …], as a plain tensor; the stack itself without expert parallelism.

    The loss of the global batch is the mean of the ranks' losses. An expert's gradient is the sum over the ranks of its
    group, which sent their tokens to it, and FSDP2 averages over the replicas alone. So it is divided by P here.
    """
    if not isinstance(stack, DTensor):
        return stack
    local: Tensor = _DivideGradient.apply(stack.to_local(), stack.device_mesh.size())
    return local


def expert_group(stack: Tensor) -> ProcessGroup | None:
    """Return the ranks that share the experts of a stack; `None` without expert parallelism."""
    return stack.device_mesh.get_group() if isinstance(stack, DTensor) else None


@torch.compiler.disable  # the host waits for the sizes of the messages anyway
def routed_experts_over_ranks(
    x: Tensor,
    gates: Tensor,
    pairs: Pairs,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    group: ProcessGroup,
) -> Tensor:
    """Compute `routed_experts` with E/P experts on each of the P ranks of ``group``. Collective.

    The exchanges are three forward (tokens and gates there, outputs back), three backward, and one of the sizes. A rank
    may send or receive nothing.

    Args:
        x: tokens of this rank [N, D].
        gates: weight of each pair, fp32 [M].
        pairs: the pairs, without padding (`pairs.sort_pairs`).
        up, gate, down: weights of this rank's experts, [E/P, D, F], the same or `None`, and [E/P, F, D].
        group: ranks that share the experts.

    Returns:
        [N, D] in the dtype of ``x``.
    """
    counts_E = pairs.offsets.diff(prepend=pairs.offsets.new_zeros(1))
    arriving_E = wait_tensor(all_to_all_single(counts_E, None, None, group))  # by source rank and local expert
    sizes_2PL = torch.stack([counts_E, arriving_E]).view(2, group.size(), -1)
    sent, received = sizes_2PL.sum(-1).tolist()

    # pairs arrive sorted by source rank and then by expert; a stable sort gives the order of one process
    by_source_PL = sizes_2PL[1].long()
    experts_E = torch.arange(up.shape[0], device=x.device).repeat(group.size())
    expert_R = experts_E.repeat_interleave(by_source_PL.flatten(), output_size=sum(received))  # known, so no wait
    by_expert_R = expert_R.argsort(stable=True)
    local_offsets_L = by_source_PL.sum(0).cumsum(0).to(torch.int32)

    rows_RD = _exchange(x.index_select(0, pairs.token), received, sent, group)
    row_gates_R = _exchange(gates, received, sent, group).index_select(0, by_expert_R)
    local_pairs = pairs_in_order(by_expert_R, local_offsets_L, rows_RD.shape[0])
    y_RD = routed_experts(rows_RD, row_gates_R, local_pairs, up, gate, down)  # in the order of arrival
    back_MD = _exchange(y_RD, sent, received, group)
    return torch.zeros_like(x).index_add(0, pairs.token, back_MD)


def _exchange(rows: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    """Send ``sent[0]`` rows to rank 0 of the group and so on; return the ``received[0]`` rows from it and so on."""
    arrived: Tensor = wait_tensor(all_to_all_single_autograd(rows, received, sent, group))
    return arrived


class _DivideGradient(torch.autograd.Function):
    """The identity, whose gradient is divided by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.divisor, None
