"""A MoE layer of a released model that routes by one of our rules.

The router's output and the call of its experts are changed by hooks, so the model's own code and names stay as they
are. While the released top-k chooses, nothing is changed and the choice is only read. Under any other choice each
chosen token-expert pair becomes a row with one expert, which every family's experts take; their outputs are summed per
token afterwards. So a token may have any number of experts, none included, and pairs that were not chosen cost nothing.

Shape letters: B sequences, S tokens, N = B·S, E experts, M chosen pairs, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.hf.mass_rules import MassRule
from lightning_moe.hf.released import ReleasedTopK
from lightning_moe.hf.structure import Block
from lightning_moe.model.routed_layer import RoutedLayer
from lightning_moe.routing import RoutingRecord, RoutingRule, RoutingState, Selection


class TransformersLayer(RoutedLayer):
    """The routing of one MoE layer of a released model; router and experts stay in that model.

    It cannot be called: the hooks run when the model is called.

    Args:
        block: MoE layer as `find_blocks` found it.

    Attributes:
        batch_shape: (B, S) of the pass, which a hook of the model sets before it.
        released_bias: selection bias of the released choice, fp32 [E]; `None` for none.
        aux_loss: auxiliary loss of the rule in the last training pass, or `None`.
        log_probabilities: whether rules other than the released one see log-softmax of the logits instead of the
            logits: for routers whose scores are softmax. Top-k and gates are the same for both; thresholds are not.
        released_routing: whether the model's own choice counts, whatever the rule is.
    """

    def __init__(self, block: Block) -> None:
        super().__init__(block.rule, block.num_experts, block.top_k)
        self.released_bias = None if block.bias is None else block.bias.detach().float().cpu().clone()
        self.path, self.released, self.top_k, self.gating = block.path, block.rule, block.top_k, block.gating
        self.log_probabilities = block.rule.score == block.gating.score == "softmax"
        self._modules_of_model = (block.router, block.experts)  # a tuple: their parameters are not this module's
        self.batch_shape: tuple[int, int] = (1, 1)
        self.aux_loss: Tensor | None = None
        self.released_routing = False
        self._tokens: Tensor | None = None  # of the pairs, between router and experts
        self._num_tokens = 0
        self.route_by(block.rule, block.top_k)
        block.router.register_forward_hook(self._after_router)
        block.experts.register_forward_pre_hook(self._before_experts, with_kwargs=True)
        block.experts.register_forward_hook(self._after_experts)

    results = RoutedLayer.results | {"batch_shape", "aux_loss", "_tokens", "_num_tokens"}

    @property
    def router(self) -> nn.Module:
        """Router, a module of the model."""
        return self._modules_of_model[0]

    @property
    def experts(self) -> nn.Module:
        """Experts, a module of the model."""
        return self._modules_of_model[1]

    @property
    def routing_module(self) -> nn.Module:
        return self.router

    @property
    def parameters_per_expert(self) -> int:
        return sum(parameter.numel() for parameter in self.experts.parameters()) // self.state.num_experts

    def expert_weights(self, expert: int) -> list[Tensor]:
        stacks = list(self.experts.parameters())
        if any(stack.shape[0] != self.state.num_experts for stack in stacks):
            return []
        return [stack.detach()[expert] for stack in stacks]

    def router_weights(self) -> Tensor | None:
        matrices = (parameter for parameter in self.router.parameters() if parameter.dim() == 2)
        return next((one.detach() for one in matrices if one.shape[0] == self.state.num_experts), None)

    def gates(self, logits: Tensor, mask: Tensor) -> Tensor:
        return self.gating.gates(logits, mask)

    def route_by(self, rule: RoutingRule, num_experts_per_token: float) -> None:
        """Replace the rule and its state; the new state is as at the start of a training.

        Rules that rank experts by the released scores get the released selection bias.

        Raises:
            UserError: the rule does not fit the layer.
        """
        rule.check(self.state.num_experts, num_experts_per_token)
        device = next(self.router.parameters()).device
        self.rule = rule
        self.state = RoutingState(rule, self.state.num_experts, num_experts_per_token).to(device)
        if self.released_bias is not None and isinstance(rule, ReleasedTopK | MassRule):
            self.state["selection_bias"].copy_(self.released_bias)

    @property
    def routes_as_released(self) -> bool:
        """Whether the model's own choice counts."""
        own = self.replayed is None and self.rule == self.released
        return self.released_routing or (own and self.state.num_experts_per_token == self.top_k)

    def _after_router(self, router: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, weights, indices = output
        self._tokens = None  # of a pass that ended before the experts
        logits = logits.float().view(*self.batch_shape, -1)
        if self.routes_as_released:
            mask = torch.zeros_like(logits, dtype=torch.bool).flatten(0, 1).scatter_(-1, indices.long(), True)
            self.record = RoutingRecord(logits.detach(), Selection(mask.view_as(logits)))
            return None
        seen = logits.log_softmax(-1) if self.log_probabilities and self.rule != self.released else logits
        selection = self.choose(seen)
        self.aux_loss = self.rule.aux_loss(seen, self.state) if self.training else None
        mask = selection.mask.flatten(0, 1)
        pairs = mask.nonzero()  # in the order of the tokens
        gates = self.gates(seen, selection.mask).flatten(0, 1)[mask]
        if not len(pairs):  # experts expect rows: one that counts nothing
            pairs, gates = pairs.new_zeros(1, 2), 0 * logits.flatten()[:1]  # with a gradient, which processes wait for
        self._tokens = pairs[:, 0]
        return logits.flatten(0, 1), gates[:, None].to(weights.dtype), pairs[:, 1:].to(indices.dtype)

    def _before_experts(self, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._tokens is None:
            return None
        hidden, *others = args
        self._num_tokens = hidden.shape[0]
        return (hidden.index_select(0, self._tokens), *others), kwargs

    def _after_experts(self, experts: nn.Module, args: Any, output: Tensor) -> Any:
        if self._tokens is None:
            return None
        tokens, self._tokens = self._tokens, None
        total = output.new_zeros(self._num_tokens, output.shape[1], dtype=torch.float32)
        return total.index_add(0, tokens, output.float()).to(output.dtype)
