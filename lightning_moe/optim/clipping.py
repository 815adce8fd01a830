"""The global norm of gradients, and clipping for parameters on several device meshes (``torch.nn.utils`` takes one)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


@torch.no_grad()
def global_norm(parameters: Iterable[Tensor], on_several_meshes: bool = False) -> Tensor:
    """Return the L2 norm of all gradients together, [], the same on all ranks. All ranks must call it.

    Args:
        parameters: parameters; those without a gradient are left out.
        on_several_meshes: whether they are distributed tensors on several meshes, each element on one rank.
    """
    if on_several_meshes:
        return _norm_over_ranks([p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)])
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _norm_over_ranks(local: list[Tensor]) -> Tensor:
    square = get_total_norm(local).square()
    dist.all_reduce(square)
    return square.sqrt()


@torch.no_grad()
def clip_by_global_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Clip all gradients in place so that their L2 norm is at most ``max_norm``. All ranks must call it.

    Args:
        parameters: distributed tensors whose elements lie on one rank each. Those without a gradient are left out.
        max_norm: largest norm of all parameters together.

    Returns:
        The norm before, []; the same on all ranks.
    """
    local = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
    norm = _norm_over_ranks(local)
    torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
