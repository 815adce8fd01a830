"""What every routing rule is: a function ``(logits, state, phase) -> selection``, and an update of its state.

A rule object holds options only and is shared by all layers. What a layer remembers between steps (thresholds,
biases, counters) is a `RoutingState`: fp32 buffers that the forward pass reads and never writes. After each optimizer
step the `RoutingStateUpdate` callback pools the router statistics of the global batch and calls `RoutingRule.update`.

Shape letters: B sequences, S tokens per sequence, E routed experts, N tokens of a pool.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_moe.errors import UserError

#: How a rule's pooled cutoff is found, with k = `target_count` of the pool: ``kth_largest`` score, the lowest of the k
#: best; ``next_largest``, the (k+1)-th, the best that is not among them (of k = N, the N-th); ``gaussian``, mean
#: + z·std of the scores, with z the normal quantile of 1 − rate.
CutoffEstimator = Literal["kth_largest", "next_largest", "gaussian"]

#: The tokens among which an expert chooses: each sequence by itself; ``n`` neighbouring sequences; ``micro_batch``, all
#: of one forward pass on one rank; ``global``, those of all ranks' forward passes.
Pool = Literal["sequence", "micro_batch", "global"] | int


class Phase(Enum):
    """When a selection is made.

    ``WARMUP``: in training, before the switch from expert choice to thresholds. ``TRAIN``: in training. ``CAUSAL``:
    validation, test, prediction and generation, where a token's experts may depend on that token and stored numbers
    only.
    """

    WARMUP = "warmup"
    TRAIN = "train"
    CAUSAL = "causal"


@dataclass(frozen=True)
class Selection:
    """Which experts each token goes to.

    Args:
        mask: bool [B, S, E], true where the token goes to the expert (z in the paper).
        num_dropped: int64 [E], tokens above the threshold that the capacity's upper bound dropped; null without
            capacity.
        num_added: int64 [E], tokens below the threshold that its lower bound added; null without capacity.
        lower_bound: tokens per expert that the capacity guarantees in this pool (0 without capacity).
    """

    mask: Tensor
    num_dropped: Tensor | None = None
    num_added: Tensor | None = None
    lower_bound: int = 0


@dataclass(frozen=True)
class RoutingRecord:
    """What the last forward pass of a layer did; detached.

    Args:
        logits: fp32 [B, S, E].
        selection: the rule's choice for them.
    """

    logits: Tensor
    selection: Selection


@dataclass(frozen=True)
class PooledStatistics:
    """One layer's router statistics over the global batch (all ranks, all accumulation steps).

    Args:
        num_tokens: int64 [], N, tokens in the pool.
        load: int64 [E], tokens sent to each expert.
        cutoff: fp32 [E], the score of each expert above which its share of the pool lies; null unless the rule asks for
            it (`RoutingRule.cutoff_estimator`).
        sketch: fp32 [R, E], the same for the R other shares of `RoutingRule.sketch_rates`; null where there are none.
    """

    num_tokens: Tensor
    load: Tensor
    cutoff: Tensor | None = None
    sketch: Tensor | None = None


def target_count(num_tokens: int, rate: float) -> int:
    """k, the tokens per expert in a pool: ``num_tokens * rate`` rounded half up, within 1 and ``num_tokens``.

    Args:
        num_tokens: N.
        rate: num_experts_per_token / num_experts.
    """
    return min(max(int(num_tokens * rate + 0.5), 1), num_tokens)


class Float32Module(nn.Module):
    """A module whose floating-point parameters and buffers stay fp32 under every ``.to(dtype)``.

    Router weights and routing state must not be rounded: in bf16, logits tie by the hundred and thresholds move.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def keep_float32(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if tensor.dtype == torch.float32 and out.dtype != torch.float32:
                out = tensor.to(device=out.device)  # moved, but not rounded on the way
            return out

        super()._apply(keep_float32, recurse)
        return self


class RoutingState(Float32Module):
    """The buffers of one layer's routing rule, read like a mapping: ``state["threshold"]``.

    All buffers are persistent: they are in every checkpoint. Floating-point buffers are fp32 always.
    """

    def __init__(self, rule: RoutingRule, num_experts: int, num_experts_per_token: float) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_experts_per_token = num_experts_per_token
        self.rule = rule
        for name, value in rule.initial_state(num_experts, num_experts_per_token).items():
            if value.is_floating_point() and value.dtype != torch.float32:
                raise TypeError(
                    f"{type(rule).__name__}: state {name!r} is {value.dtype}; floating state must be float32"
                )
            self.register_buffer(name, value)
        threshold = self._buffers.get("threshold")
        if rule.causal_choice is CausalChoice.THRESHOLD and (threshold is None or threshold.shape != (num_experts,)):
            raise TypeError(f"{type(rule).__name__}: causal_choice THRESHOLD needs a state 'threshold' [num_experts]")

    def reset_parameters(self) -> None:
        """Write the initial values again (after a construction on the meta device)."""
        for name, value in self.rule.initial_state(self.num_experts, self.num_experts_per_token).items():
            self[name].copy_(value)

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    @property
    def rate(self) -> float:
        """The target share of tokens per expert."""
        return self.num_experts_per_token / self.num_experts


class CausalChoice(Enum):
    """A way to choose at inference that other code can write down (`export`) and imitate (`calibrate`).

    ``THRESHOLD``: the experts whose logit exceeds ``state["threshold"]`` fp32 [E].
    ``TOP_K``: the ``num_experts_per_token`` experts of the highest logit plus ``state["selection_bias"]`` fp32 [E], if
    the state has that. Among equal scores the expert with the lower index wins.
    ``TOP_K_OF_SIGMOID``: the same with the sigmoid of the logits.
    """

    THRESHOLD = "threshold"
    TOP_K = "top_k"
    TOP_K_OF_SIGMOID = "top_k_of_sigmoid"

    def mask(self, logits: Tensor, state: RoutingState) -> Tensor:
        """Compute the choice: fp32 [B, S, E] → bool [B, S, E]."""
        if self is CausalChoice.THRESHOLD:
            return logits > state["threshold"]
        scores = logits.sigmoid() if self is CausalChoice.TOP_K_OF_SIGMOID else logits
        if "selection_bias" in state:
            scores = scores + state["selection_bias"]
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : int(state.num_experts_per_token)]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


class RoutingRule(ABC):
    """Base class of all rules. A rule is a frozen dataclass of its options; it has no state of its own."""

    #: whether training starts with the `Phase.WARMUP` rule and switches (the `ThresholdWarmup` callback does it)
    has_warmup: ClassVar[bool] = False
    #: what `select` does in `Phase.CAUSAL`; None: something else. A class that overrides `select` declares it again,
    #: because what its parent declared may not hold any more.
    causal_choice: ClassVar[CausalChoice | None] = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        last = next(base for base in cls.__mro__ if not {"select", "causal_choice"}.isdisjoint(vars(base)))
        if "causal_choice" not in vars(last):
            cls.causal_choice = None

    @property
    def cutoff_estimator(self) -> CutoffEstimator | None:
        """How the pooled cutoff that `update` gets is found; null where it needs none."""
        return None

    @property
    def pools_over_ranks(self) -> bool:
        """Whether `select` pools the tokens of all ranks in training, by collectives in the forward pass.

        All ranks must then run the same forward passes, and the global batch must be one micro-batch per rank.
        """
        return "global" in (self.pool_in(Phase.WARMUP), self.pool_in(Phase.TRAIN))

    def pool_in(self, phase: Phase) -> Pool | None:
        """Return the tokens among which experts choose in ``phase``; None where `select` looks at each token alone."""
        return None

    def memory(self, num_tokens: int) -> float | None:
        """Return how many tokens the state is an average over, with ``num_tokens`` in a global batch; None: it is none.

        It stands for the pool of a rule whose thresholds choose in training (`analysis.pools`).
        """
        return None

    @abstractmethod
    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        """Choose experts.

        Args:
            logits: detached fp32 [B, S, E] router logits r.
            state: this layer's state; read only.
            phase: see `Phase`; in ``CAUSAL`` the mask of a token must depend on its own logits and the state alone.
        """

    def check(self, num_experts: int, num_experts_per_token: float) -> None:  # noqa: B027 - optional hook
        """Refuse a layer shape that this rule cannot serve (raises `UserError`)."""

    def initial_state(self, num_experts: int, num_experts_per_token: float) -> Mapping[str, Tensor]:
        """Names and initial values of the state's buffers (floating ones fp32)."""
        return {}

    def pool_scores(self, logits: Tensor, state: RoutingState) -> Tensor:
        """The scores [..., E] whose pooled cutoff is wanted; the logits themselves unless overridden."""
        return logits

    def sketch_rates(self, rate: float) -> tuple[float, ...]:
        """Shares of the pool, beside the target ``rate``, whose cutoffs `update` gets too."""
        return ()

    def set_inference_num_experts_per_token(self, state: RoutingState, value: float) -> None:
        """Change ``state`` in place so that `Phase.CAUSAL` chooses ``value`` experts per token, as a mean.

        Raises:
            UserError: this rule, or what it has stored, cannot serve that many.
        """
        raise UserError(
            f"inference_num_experts_per_token={value:g}: {type(self).__name__} was trained for "
            f"{state.num_experts_per_token:g} and cannot route to another number of experts per token."
        )

    def set_thresholds(self, state: RoutingState, cutoffs: Tensor) -> None:
        """Set the thresholds of a rule with `CausalChoice.THRESHOLD` in place (`calibrate`).

        Args:
            state: the state of one layer.
            cutoffs: fp32 [1 + R, E], the logits above which the target share of the tokens lies, and the R shares of
                `sketch_rates`.
        """
        state["threshold"].copy_(cutoffs[0])

    def update(self, state: RoutingState, statistics: PooledStatistics) -> None:  # noqa: B027 - optional hook
        """Update ``state`` in place, once per optimizer step, from the global batch's statistics."""

    def aux_loss(self, logits: Tensor, state: RoutingState) -> Tensor | None:
        """A scalar added to the training loss, differentiable in ``logits`` [B, S, E]; null for none."""
        return None

    def to_config(self) -> dict[str, Any]:
        """The rule as plain data: ``{"class_path": …, "init_args": {…}}``."""
        if not dataclasses.is_dataclass(self):
            raise UserError(f"model.routing: {type(self).__name__} must be a dataclass of its options.")
        path = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class_path": path, "init_args": dataclasses.asdict(self)}


def rule_from_config(config: Mapping[str, Any] | None) -> RoutingRule | None:
    """The inverse of `RoutingRule.to_config`; null stands for the dense model.

    Raises:
        UserError: the class cannot be imported, is not a `RoutingRule`, or does not have these options.
    """
    if config is None:
        return None
    module_name, _, class_name = str(config["class_path"]).rpartition(".")
    try:
        import importlib

        rule_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"model.routing: the routing rule {config['class_path']!r} cannot be imported ({error}); "
            "put the file that defines it on PYTHONPATH."
        ) from error
    if not (isinstance(rule_class, type) and issubclass(rule_class, RoutingRule)):
        raise UserError(f"model.routing: {config['class_path']!r} is not a RoutingRule.")
    try:
        return rule_class(**config.get("init_args", {}))
    except TypeError as error:
        raise UserError(f"model.routing: {config['class_path']} does not take these options: {error}") from error
