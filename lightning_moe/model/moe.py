"""The MoE layer: one router, one set of experts and one combine for every routing rule; only the rule differs.

    y_t = shared(x_t) + Σ_i z_{t,i} · gate(r_t)_i · expert_i(x_t)          (Eq. 2 of arXiv 2603.11535)

Shape letters: B sequences, S tokens per sequence, N = B·S, E experts, D hidden size, M chosen token-expert pairs.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moe.model.config import DecoderConfig
from lightning_moe.model.exact_product import exact_linear
from lightning_moe.model.experts import Experts
from lightning_moe.model.initialise import initialise, parent_initialises
from lightning_moe.model.layers import FeedForward
from lightning_moe.routing.base import Float32Module, Phase, RoutingRecord, RoutingRule, RoutingState

#: remedy for a training without updates of the routing state
HOW_TO_UPDATE = (
    "Give Lightning's Trainer the callback (from lightning_moe.callbacks import RoutingStateUpdate): "
    "Trainer(callbacks=[RoutingStateUpdate()], ...). docs/python.md shows it, and a loop without Lightning."
)


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


class MoELayer(nn.Module):
    """Shared expert + routed experts under a routing rule.

    Attributes:
        state: stored thresholds, biases and counters of the rule; the forward pass only reads it.
        train_phase: `Phase` while ``training`` (set by the `ThresholdWarmup` callback). In ``eval()`` the phase is
            always ``Phase.CAUSAL``.
        record: `RoutingRecord` of the last forward pass. Recomputation under activation checkpointing overwrites it
            with the same content, so nothing counts twice (decision 3).
        was_trained: whether there was a forward pass with gradients in training since this object was built.
    """

    def __init__(self, config: DecoderConfig, rule: RoutingRule, num_experts_per_token: float) -> None:
        super().__init__()
        rule.check(config.num_experts, num_experts_per_token)
        self.rule = rule
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
        self.state = RoutingState(rule, config.num_experts, num_experts_per_token)
        self.train_phase = Phase.TRAIN
        self.record: RoutingRecord | None = None
        self.was_trained = False
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

    def train(self, mode: bool = True) -> Self:
        """Set the mode. Leaving training, warn if nothing has updated the routing state of a rule that needs it."""
        needed = self.training and not mode and self.was_trained and self.rule.updates_state
        if needed and not self.state.was_updated:
            warnings.warn(
                f"MoELayer: the layer was trained, but nothing has updated the routing state, which "
                f"{type(self.rule).__name__} needs: it still routes as at the start. {HOW_TO_UPDATE}",
                stacklevel=2,
            )
        return super().train(mode)

    @property
    def phase(self) -> Phase:
        """The phase of the next forward pass."""
        return self.train_phase if self.training else Phase.CAUSAL

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map ``x`` [B, S, D] to the output [B, S, D] and the auxiliary loss of rule and router, or `None`."""
        logits = self.router(x)  # fp32 [B, S, E]
        selection = self.rule.select(logits.detach(), self.state, self.phase)
        self.record = RoutingRecord(logits.detach(), selection)
        aux_loss = self.aux_loss(logits) if self.training else None
        if self.training and torch.is_grad_enabled():
            self.was_trained = True

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
        """Return the weights of the experts' outputs, fp32 [B, S, E], differentiable in ``logits``."""
        gates = logits.sigmoid() if self.gate == "sigmoid" else logits.softmax(dim=-1)
        if self.normalize_gates:
            gates = gates / (gates * mask).sum(-1, keepdim=True).clamp_min(1e-9)
        return gates
