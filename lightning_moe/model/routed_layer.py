"""What every MoE layer has, whoever wrote its router and experts: a rule, its state, and a record of the last pass.

`MoELayer` is the layer of our own decoder. `hf.TransformersLayer` is one that routes inside of a released model.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_moe.routing.base import Phase, RoutingRecord, RoutingRule, RoutingState, Selection

#: remedy for a training without updates of the routing state
HOW_TO_UPDATE = (
    "Give Lightning's Trainer the callback (from lightning_moe.callbacks import RoutingStateUpdate): "
    "Trainer(callbacks=[RoutingStateUpdate()], ...). docs/python.md shows it, and a loop without Lightning."
)


class RoutedLayer(nn.Module):
    """Base of the MoE layers: which experts each token takes, and what is remembered of it.

    Args:
        rule: routing rule.
        num_experts: number E of routed experts.
        num_experts_per_token: target of the rule, a mean.

    Attributes:
        state: stored thresholds, biases and counters of the rule; the forward pass only reads it.
        train_phase: `Phase` while ``training`` (set by the `ThresholdWarmup` callback). In ``eval()`` the phase is
            always ``Phase.CAUSAL``.
        record: `RoutingRecord` of the last forward pass. Recomputation under activation checkpointing overwrites it
            with the same content, so nothing counts twice (decision 3).
        replayed: experts that every token takes instead of those that the rule chooses, bool [B, S, E]; `None` to
            let the rule choose. See `model.moe_layers.replay`.
        was_trained: whether there was a forward pass with gradients in training since this object was built.
    """

    #: attributes that every pass writes and no pass reads
    results: ClassVar[frozenset[str]] = frozenset({"record"})

    def __init__(self, rule: RoutingRule, num_experts: int, num_experts_per_token: float) -> None:
        super().__init__()
        rule.check(num_experts, num_experts_per_token)
        self.rule = rule
        self.state = RoutingState(rule, num_experts, num_experts_per_token)
        self.train_phase = Phase.TRAIN
        self.record: RoutingRecord | None = None
        self.replayed: Tensor | None = None
        self.was_trained = False

    @property
    def phase(self) -> Phase:
        """The phase of the next forward pass."""
        return self.train_phase if self.training else Phase.CAUSAL

    def train(self, mode: bool = True) -> Self:
        """Set the mode. Leaving training, warn if nothing has updated the routing state of a rule that needs it."""
        needed = self.training and not mode and self.was_trained and self.rule.updates_state
        if needed and not self.state.was_updated:
            warnings.warn(
                f"{type(self).__name__}: the layer was trained, but nothing has updated the routing state, which "
                f"{type(self.rule).__name__} needs: it still routes as at the start. {HOW_TO_UPDATE}",
                stacklevel=2,
            )
        return super().train(mode)

    def choose(self, logits: Tensor) -> Selection:
        """Choose experts for router logits fp32 [B, S, E], and record both."""
        if self.replayed is None:
            selection = self.rule.select(logits.detach(), self.state, self.phase)
        else:
            selection = Selection(self.replayed)
        self.record = RoutingRecord(logits.detach(), selection)
        if self.training and torch.is_grad_enabled():
            self.was_trained = True
        return selection

    @property
    def routing_module(self) -> nn.Module:
        """Module after whose call `record` is that of the pass; its forward hooks may end the pass there."""
        return self

    @abstractmethod
    def gates(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the weights of the experts' outputs, fp32 [B, S, E], differentiable in ``logits``.

        Args:
            logits: router logits, fp32 [B, S, E].
            mask: chosen experts, bool [B, S, E]. Where it is false, the result means nothing.
        """

    @property
    @abstractmethod
    def parameters_per_expert(self) -> int:
        """Number of parameters of one routed expert."""

    def expert_weights(self, expert: int) -> Sequence[Tensor]:
        """Return the weight matrices of a routed expert, without copies where that is possible.

        All experts of a layer have the same shapes in the same order. Empty where they cannot be read.
        """
        return ()

    def router_weights(self) -> Tensor | None:
        """Return the router's row for each expert, [E, D]; `None` where the router has no such matrix."""
        return None
