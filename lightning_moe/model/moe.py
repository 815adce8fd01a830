"""The MoE layer: one router, one set of experts and one combine for every routing rule; only the rule differs.

    y_t = shared(x_t) + Σ_i z_{t,i} · gate(r_t)_i · expert_i(x_t)          (Eq. 2 of arXiv 2603.11535)

Shape letters: B sequences, S tokens per sequence, N = B·S, E experts, D hidden size, M chosen token-expert pairs.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moe.model.config import DecoderConfig
from lightning_moe.model.exact_product import exact_linear
from lightning_moe.model.experts import Experts
from lightning_moe.model.initialise import initialise, parent_initialises
from lightning_moe.model.layers import FeedForward
from lightning_moe.model.routed_layer import RoutedLayer
from lightning_moe.routing.base import Float32Module, RoutingRule


class Router(Float32Module):
    """A linear map to logits, r = W x, in exact fp32 and outside of autocast, whatever the precision of the rest.

    With ``cosine`` the logit is the cosine similarity of token and prototype times a learned scale. The scale starts at
    √D, so that fresh logits have unit variance, like those of the linear router.
    """

    def __init__(self, hidden_size: int, num_experts: int, cosine: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        self.scale = nn.Parameter(torch.empty(1, dtype=torch.float32)) if cosine else None  # FSDP2: no scalars
        initialise(self)

    def reset_parameters(self) -> None:
        """Set initial weights that give logits of unit variance for normalised tokens."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        if self.scale is not None:
            nn.init.constant_(self.scale, self.weight.shape[1] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, S, D] of any dtype to fp32 [B, S, E]."""
        if self.scale is None:
            return exact_linear(x, self.weight)
        device = x.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            return self.scale * exact_linear(F.normalize(x.float(), dim=-1), F.normalize(self.weight, dim=-1))


class MoELayer(RoutedLayer):
    """Shared expert + routed experts under a routing rule; see `RoutedLayer` for what all MoE layers have."""

    def __init__(self, config: DecoderConfig, rule: RoutingRule, num_experts_per_token: float) -> None:
        super().__init__(rule, config.num_experts, num_experts_per_token)
        self.gate, self.normalize_gates = config.gate, config.normalize_gates
        self.router_z_loss_coef = config.router_z_loss_coef
        with parent_initialises():
            self.router = Router(config.hidden_size, config.num_experts, config.router == "cosine")
            self.experts = Experts(config.num_experts, config.hidden_size, config.expert_size, config.activation)
            self.shared_expert = (
                FeedForward(config.hidden_size, config.num_shared_experts * config.expert_size, config.activation)
                if config.num_shared_experts
                else None
            )
        initialise(self)

    def reset_parameters(self) -> None:
        """Set the initial weights of router and experts, and the initial routing state.

        The experts' down projections start at zero (paper), so the layer's first output is zero.
        """
        self.router.reset_parameters()
        self.experts.reset_parameters()
        if self.shared_expert is not None:
            self.shared_expert.reset_parameters()
        self.state.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map ``x`` [B, S, D] to the output [B, S, D] and the auxiliary loss of rule and router, or `None`."""
        logits = self.router(x)  # fp32 [B, S, E]
        selection = self.choose(logits)
        aux_loss = self.aux_loss(logits) if self.training else None
        flat = x.flatten(0, 1)  # [N, D]
        gates = self.gates(logits, selection.mask)
        y = self.experts(flat, selection.mask.flatten(0, 1), gates.flatten(0, 1), selection.max_pairs)
        if self.shared_expert is not None:
            y = y + self.shared_expert(flat)
        return y.view_as(x), aux_loss

    def aux_loss(self, logits: Tensor) -> Tensor | None:
        """Return the rule's auxiliary loss and the router z-loss, differentiable in ``logits`` [B, S, E], or `None`."""
        aux_loss = self.rule.aux_loss(logits, self.state)
        if not self.router_z_loss_coef:
            return aux_loss
        z_loss = self.router_z_loss_coef * logits.logsumexp(-1).square().mean()
        return z_loss if aux_loss is None else aux_loss + z_loss

    def gates(self, logits: Tensor, mask: Tensor) -> Tensor:
        gates = logits.sigmoid() if self.gate == "sigmoid" else logits.softmax(dim=-1)
        if self.normalize_gates:
            gates = gates / (gates * mask).sum(-1, keepdim=True).clamp_min(1e-9)
        return gates

    @property
    def parameters_per_expert(self) -> int:
        return sum(parameter.numel() for parameter in self.experts.parameters()) // self.state.num_experts

    def expert_weights(self, expert: int) -> list[Tensor]:
        return [stack.detach()[expert] for stack in self.experts.parameters()]

    def router_weights(self) -> Tensor:
        return self.router.weight.detach()
