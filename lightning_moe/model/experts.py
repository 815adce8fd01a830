"""The experts: stacked weights, and the dropless computation over tokens sorted by expert.

Measured on a 2-core AVX512-bf16 CPU (forward + backward, 4096 token-expert pairs, 16 experts, median of 20; ratio
to one dense network of the same FLOPs): ``grouped_mm`` 1.21 fp32 / 1.28 bf16 at d=192 and 1.21 / 1.13 at d=512; a
Python loop over experts 1.6 / 1.9 and 3.2 / 2.3.

Shape letters: M token-expert pairs, E experts, D hidden size, F hidden size of an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moe.model.config import Activation
from lightning_moe.model.layers import activate, init_matrix


class Experts(nn.Module):
    """E feed-forward networks with stacked weights ``up`` (and ``gate``) [E, D, F] and ``down`` [E, F, D]."""

    def __init__(self, num_experts: int, hidden_size: int, expert_hidden_size: int, activation: Activation) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.expert_hidden_size = (
            num_experts,
            hidden_size,
            expert_hidden_size,
        )
        self.up = nn.Parameter(torch.empty(num_experts, hidden_size, expert_hidden_size))
        self.gate = (
            nn.Parameter(torch.empty(num_experts, hidden_size, expert_hidden_size)) if activation == "swiglu" else None
        )
        self.down = nn.Parameter(torch.empty(num_experts, expert_hidden_size, hidden_size))

    def reset_parameters(self) -> None:
        for weight in (self.up, self.gate):
            if weight is not None:
                init_matrix(weight, self.hidden_size, self.expert_hidden_size)
        nn.init.zeros_(self.down)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Each row through its expert.

        Args:
            x: [M, D], rows sorted by expert.
            offsets: int32 [E]; rows ``offsets[i-1]:offsets[i]`` belong to expert i; ``offsets[-1]`` is M.

        Returns:
            [M, D] in the compute dtype (autocast's where it is on).
        """
        up = grouped_linear(x, self.up, offsets)
        gate = None if self.gate is None else grouped_linear(x, self.gate, offsets)
        return grouped_linear(activate(up, gate), self.down, offsets)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``x[rows of i] @ weight[i]`` for every expert i: [M, D] × [E, D, F] → [M, F].

    ``grouped_mm`` where it takes the shapes (it ignores autocast, so the cast is done here); else a loop of matmuls.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if _takes_grouped_mm(x, weight):
        return F.grouped_mm(x, weight, offs=offsets)
    counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    return torch.cat([rows @ weight[i] for i, rows in enumerate(x.split(counts))])


def _takes_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """``grouped_mm`` wants strides of whole 16 bytes, and on CUDA has a kernel for bf16."""
    rows_aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    return rows_aligned and (x.device.type == "cpu" or x.dtype == torch.bfloat16) and x.dtype != torch.float64
