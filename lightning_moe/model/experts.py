"""The routed experts: stacked weights, and the dropless computation over tokens sorted by expert.

Shape letters: N tokens, E experts, M chosen token-expert pairs, D hidden size, F hidden size of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_moe import waits
from lightning_moe.model.config import Activation
from lightning_moe.model.expert_parallel import expert_group, local_experts, routed_experts_over_ranks
from lightning_moe.model.initialise import init_matrix, initialise
from lightning_moe.model.pairs import pack_pairs, sort_pairs
from lightning_moe.model.routed import routed_experts


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
        initialise(self)

    def reset_parameters(self) -> None:
        """Set the initial weights of the paper; the down projections start at zero."""
        for weight in (self.up, self.gate):
            if weight is not None:
                init_matrix(weight, self.hidden_size, self.expert_hidden_size)
        nn.init.zeros_(self.down)

    def forward(self, x: Tensor, mask: Tensor, gates: Tensor, max_pairs: int | None = None) -> Tensor:
        """Compute y_t = Σ_i mask_{t,i} · gates_{t,i} · expert_i(x_t).

        Args:
            x: [N, D].
            mask: bool [N, E], the experts that each token goes to.
            gates: fp32 [N, E]; only the gates of chosen pairs are read and get a gradient.
            max_pairs: bound on the chosen pairs, `Selection.max_pairs`.

        Returns:
            [N, D] in the compute dtype (that of autocast if it is on); zero for a token without an expert.
        """
        up, down = local_experts(self.up), local_experts(self.down)
        gate = None if self.gate is None else local_experts(self.gate)
        if torch.is_autocast_enabled(x.device.type):  # the operation below does not look at autocast
            x = x.to(torch.get_autocast_dtype(x.device.type))
        group = expert_group(self.up)
        by_expert = gates.t().reshape(-1)
        if group is None and max_pairs is not None and waits.reading_waits(x.device):
            pairs = pack_pairs(mask, max_pairs)
            # A broken promise would drop pairs in silence; NaN ends the run instead, without a wait here.
            by_expert = torch.where(mask.sum() <= max_pairs, by_expert, torch.nan)
        else:
            pairs = sort_pairs(mask, max_pairs)
        pair_gates = by_expert.index_select(0, pairs.cell)  # [M]
        if group is None:
            return routed_experts(x, pair_gates, pairs, up, gate, down)
        y: Tensor = routed_experts_over_ranks(x, pair_gates, pairs, up, gate, down, group)
        return y
