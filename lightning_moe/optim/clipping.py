"""Clipping by the global norm for parameters on several device meshes (``torch.nn.utils`` takes one mesh)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


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
    square = get_total_norm(local).square()
    dist.all_reduce(square)
    norm = square.sqrt()
    torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
