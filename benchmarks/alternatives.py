"""Other ways to compute the MoE layer's routed experts and the loss, with the same weights, to measure ours against.

Shape letters: N tokens, E experts, C the tokens of the busiest expert, D hidden size, F hidden size of an expert, V
vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moe.model import MoELayer, next_token_loss
from lightning_moe.model.layers import activate


class Alternative(nn.Module):
    """The layer with another computation of its routed experts; same parameters, same routing."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer: [B, S, D] → [B, S, D]."""
        layer = self.layer
        logits = layer.router(x)
        mask = layer.rule.select(logits.detach(), layer.state, layer.phase).mask
        gates = layer.gates(logits, mask).flatten(0, 1)
        flat = x.flatten(0, 1)
        y = self.routed(flat, mask.flatten(0, 1), gates)
        if layer.shared_expert is not None:
            y = y + layer.shared_expert(flat)
        return y.view_as(x)

    def routed(self, x: Tensor, mask: Tensor, gates: Tensor) -> Tensor:
        """Compute Σ_i mask_i · gates_i · expert_i(x): [N, D], bool [N, E], fp32 [N, E] → [N, D]."""
        raise NotImplementedError

    def expert(self, x: Tensor, index: int | slice) -> Tensor:
        """Apply one expert to [rows, D], or several to [E, rows, D]."""
        experts = self.layer.experts
        gate = None if experts.gate is None else x @ experts.gate[index].to(x.dtype)
        return activate(x @ experts.up[index].to(x.dtype), gate) @ experts.down[index].to(x.dtype)


class Loop(Alternative):
    """The simplest way: for every expert gather its tokens, compute, add."""

    def routed(self, x: Tensor, mask: Tensor, gates: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for index in range(mask.shape[1]):
            tokens = mask[:, index].nonzero().squeeze(-1)
            out = self.expert(x[tokens], index) * gates[tokens, index, None].to(x.dtype)
            y = y.index_add(0, tokens, out)
        return y


class Padded(Alternative):
    """The design of the public Expert Threshold code, from its description: pad every expert to the busiest one,
    multiply all in one batch, add up in fp32."""

    def routed(self, x: Tensor, mask: Tensor, gates: Tensor) -> Tensor:
        counts = mask.sum(0)  # [E]
        size = int(counts.max())
        order = mask.t().int().argsort(dim=1, descending=True, stable=True)[:, :size]  # [E, C] chosen tokens first
        valid = torch.arange(size, device=x.device) < counts[:, None]
        weights = gates.t().gather(1, order) * valid  # [E, C]
        out = self.expert(x[order], slice(None))  # [E, C, D]
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        return y.index_add(0, order.flatten(), (out * weights.unsqueeze(-1)).flatten(0, 1).float()).to(x.dtype)


class Grouped(Alternative):
    """torch's ``grouped_mm`` over tokens sorted by expert, with autograd's backward pass."""

    def routed(self, x: Tensor, mask: Tensor, gates: Tensor) -> Tensor:
        experts = self.layer.experts
        on_device = x.device.type
        dtype = torch.get_autocast_dtype(on_device) if torch.is_autocast_enabled(on_device) else x.dtype
        expert, token = mask.t().nonzero(as_tuple=True)
        offsets = mask.sum(0).cumsum(0).to(torch.int32)
        rows = x.to(dtype)[token]

        def product(a: Tensor, weight: Tensor) -> Tensor:
            return F.grouped_mm(a, weight.to(dtype), offs=offsets)

        gate = None if experts.gate is None else product(rows, experts.gate)
        out = product(activate(product(rows, experts.up), gate), experts.down)
        weighted = out * gates[token, expert, None].to(dtype)
        return torch.zeros_like(x, dtype=dtype).index_add(0, token, weighted)


ALTERNATIVES: dict[str, type[Alternative]] = {
    "loop over experts": Loop,
    "padded (reference style)": Padded,
    "grouped_mm, autograd": Grouped,
}


def loss_of_whole_logits(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Compute the sum of the next-token losses with all logits at once: [B, S, D], [V, D], int64 [B, S] → fp32 []."""
    logits = F.linear(hidden, weight).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return next_token_loss(logits, labels).sum()
