"""The base of all routing rules: a function ``(logits, state, phase) -> selection``, and an update of its state.

A rule object holds options only, and all layers share it. A layer remembers thresholds, biases and counters between
steps in its `RoutingState`: fp32 buffers that the forward pass reads and never writes. After each optimizer step the
`RoutingStateUpdate` callback pools the router statistics of the global batch and calls `RoutingRule.update`.

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
from lightning_moe.routing.top_experts import top_experts_mask

#: The score that a rule wants as its pooled cutoff, with k = `target_count` of the pool. ``kth_largest``: the lowest of
#: the k best. ``next_largest``: the (k+1)-th, the best that is not among them (for k = N, the N-th). ``gaussian``:
#: mean + z·std of the scores, with z the normal quantile of 1 − rate.
CutoffEstimator = Literal["kth_largest", "next_largest", "gaussian"]

#: The tokens among which an expert chooses. ``sequence``: those of each sequence by itself. A number: those of so many
#: neighbouring sequences. ``micro_batch``: those of a forward pass on one rank. ``global``: those of all ranks' passes.
Pool = Literal["sequence", "micro_batch", "global"] | int


class Phase(Enum):
    """What a selection is made for.

    ``WARMUP``: training before the switch from expert choice to thresholds. ``TRAIN``: training. ``CAUSAL``:
    validation, test, prediction and generation, where a token's experts depend on that token and stored numbers only.
    """

    WARMUP = "warmup"
    TRAIN = "train"
    CAUSAL = "causal"


@dataclass(frozen=True)
class Selection:
    """Which experts each token goes to.

    Args:
        mask: bool [B, S, E], true where the token goes to the expert (z in the paper).
        num_dropped: int64 [E], tokens above the threshold that the capacity's upper bound dropped; `None` without
            capacity.
        num_added: int64 [E], tokens below the threshold that its lower bound added; `None` without capacity.
        lower_bound: tokens per expert that the capacity guarantees in this pool (0 without capacity).
        max_pairs: bound on the true values of ``mask`` that is known without looking at the logits, at least 1. With
            it a training step on a GPU never waits for the number of pairs, but has room for so many. `None` for no
            bound below the mask's size.
    """

    mask: Tensor
    num_dropped: Tensor | None = None
    num_added: Tensor | None = None
    lower_bound: int = 0
    max_pairs: int | None = None


@dataclass(frozen=True)
class RoutingRecord:
    """The logits and the choice of a layer's last forward pass; detached.

    Args:
        logits: router logits, fp32 [B, S, E].
        selection: choice of the rule for them.
    """

    logits: Tensor
    selection: Selection


@dataclass(frozen=True)
class PooledStatistics:
    """One layer's router statistics over the global batch (all ranks, all accumulation steps).

    Args:
        num_tokens: number N of tokens in the pool, int64 [].
        load: tokens sent to each expert, int64 [E].
        cutoff: score of each expert above which its share of the pool lies, fp32 [E]; `None` unless the rule asks for
            it (`RoutingRule.cutoff_estimator`).
        sketch: the same for the R other shares of `RoutingRule.sketch_rates`, fp32 [R, E]; `None` where there are none.
    """

    num_tokens: Tensor
    load: Tensor
    cutoff: Tensor | None = None
    sketch: Tensor | None = None


def target_count(num_tokens: int, rate: float) -> int:
    """Return k, the tokens per expert in a pool: ``num_tokens * rate`` rounded half up, from 1 to ``num_tokens``.

    Args:
        num_tokens: number N of tokens in the pool.
        rate: target share, num_experts_per_token / num_experts.
    """
    return min(max(int(num_tokens * rate + 0.5), 1), num_tokens)


class Float32Module(nn.Module):
    """A module whose floating-point parameters and buffers stay fp32 under every ``.to(dtype)``.

    Router weights and routing state must not be rounded: in bf16, hundreds of logits tie and thresholds move.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def keep_float32(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if tensor.dtype == torch.float32 and out.dtype != torch.float32:
                out = tensor.to(device=out.device)  # moved, but not rounded
            return out

        super()._apply(keep_float32, recurse)
        return self


class RoutingState(Float32Module):
    """The buffers of one layer's routing rule, read like a mapping: ``state["threshold"]``.

    All buffers are persistent: every checkpoint has them. Floating-point buffers are always fp32.

    Attributes:
        was_updated: whether `update` has been called since this object was built.
    """

    def __init__(self, rule: RoutingRule, num_experts: int, num_experts_per_token: float) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_experts_per_token = num_experts_per_token
        self.rule = rule
        self.was_updated = False
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
        """Write the initial values again, after a construction on the meta device."""
        for name, value in self.rule.initial_state(self.num_experts, self.num_experts_per_token).items():
            self[name].copy_(value)

    def update(self, statistics: PooledStatistics) -> None:
        """Let the rule update the state from the global batch's statistics, once per optimizer step."""
        self.rule.update(self, statistics)
        self.was_updated = True

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    @property
    def rate(self) -> float:
        """The target share of tokens per expert."""
        return self.num_experts_per_token / self.num_experts


class CausalChoice(Enum):
    """A way to choose at inference that `export` can write down and `calibrate` can imitate.

    ``THRESHOLD``: the experts whose logit exceeds ``state["threshold"]`` fp32 [E].
    ``TOP_K``: the ``num_experts_per_token`` experts with the highest logit plus ``state["selection_bias"]`` fp32 [E],
    if the state has that. Among equal scores the expert with the lower index wins.
    ``TOP_K_OF_SIGMOID``: the same with the sigmoid of the logits.
    """

    THRESHOLD = "threshold"
    TOP_K = "top_k"
    TOP_K_OF_SIGMOID = "top_k_of_sigmoid"

    def mask(self, logits: Tensor, state: RoutingState) -> Tensor:
        """Return the choice for logits: fp32 [B, S, E] → bool [B, S, E]."""
        if self is CausalChoice.THRESHOLD:
            return logits > state["threshold"]
        scores = logits.sigmoid() if self is CausalChoice.TOP_K_OF_SIGMOID else logits
        if "selection_bias" in state:
            scores = scores + state["selection_bias"]
        return top_experts_mask(scores, int(state.num_experts_per_token))


class RoutingRule(ABC):
    """Base class of all rules. A rule is a frozen dataclass of its options; it has no state of its own."""

    #: whether training begins in `Phase.WARMUP`; the `ThresholdWarmup` callback ends it
    has_warmup: ClassVar[bool] = False
    #: what `select` does in `Phase.CAUSAL`; `None` if it is none of these. A class that overrides `select` declares it
    #: again, because what its parent declared may no longer hold.
    causal_choice: ClassVar[CausalChoice | None] = None
    #: whether all experts of a layer share one cutoff of their scores, instead of having one each
    shares_cutoff: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        last = next(base for base in cls.__mro__ if not {"select", "causal_choice"}.isdisjoint(vars(base)))
        if "causal_choice" not in vars(last):
            cls.causal_choice = None

    @property
    def cutoff_estimator(self) -> CutoffEstimator | None:
        """The kind of pooled cutoff that `update` gets; `None` if it needs none."""
        return None

    @property
    def updates_state(self) -> bool:
        """Whether training must call `RoutingState.update`; without it, thresholds or biases stay as they began."""
        return type(self).update is not RoutingRule.update

    @property
    def pools_over_ranks(self) -> bool:
        """Whether `select` pools the tokens of all ranks in training, with collectives in the forward pass.

        Then all ranks must run the same forward passes, and the global batch must be one micro-batch per rank.
        """
        return "global" in (self.pool_in(Phase.WARMUP), self.pool_in(Phase.TRAIN))

    def pool_in(self, phase: Phase) -> Pool | None:
        """Return the tokens among which experts choose in ``phase``; `None` if `select` looks at each token alone."""
        return None

    def memory(self, num_tokens: int) -> float | None:
        """Return how many tokens the state averages over, for ``num_tokens`` in a global batch; `None` if it does not.

        It takes the place of the pool for a rule whose thresholds choose in training (`analysis.pools`).
        """
        return None

    @abstractmethod
    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        """Choose experts.

        Args:
            logits: router logits r, detached, fp32 [B, S, E].
            state: state of this layer, read only.
            phase: phase; in ``CAUSAL`` a token's mask must depend on its own logits and the state only.
        """

    def check(self, num_experts: int, num_experts_per_token: float) -> None:  # noqa: B027 - optional hook
        """Raise `UserError` for a layer shape that this rule cannot serve."""

    def initial_state(self, num_experts: int, num_experts_per_token: float) -> Mapping[str, Tensor]:
        """Return names and initial values of the state's buffers; floating ones are fp32."""
        return {}

    def pool_scores(self, logits: Tensor, state: RoutingState) -> Tensor:
        """Return the scores [..., E] whose pooled cutoff is wanted; by default the logits themselves."""
        return logits

    def sketch_rates(self, rate: float) -> tuple[float, ...]:
        """Return further shares of the pool, beside the target ``rate``, whose cutoffs `update` gets."""
        return ()

    def set_inference_num_experts_per_token(self, state: RoutingState, value: float) -> None:
        """Change ``state`` in place so that `Phase.CAUSAL` chooses ``value`` experts per token on average.

        Raises:
            UserError: this rule or its state cannot serve that many.
        """
        raise UserError(
            f"inference_num_experts_per_token={value:g}: {type(self).__name__} was trained for "
            f"{state.num_experts_per_token:g} and cannot route to another number of experts per token."
        )

    def set_thresholds(self, state: RoutingState, cutoffs: Tensor) -> None:
        """Set the thresholds of a rule that chooses by some in place (`calibrate`).

        Args:
            state: state of one layer.
            cutoffs: scores (`pool_scores`) above which the target share of the tokens lies, and each of the R shares of
                `sketch_rates`, fp32 [1 + R, E]; with `shares_cutoff` those of all experts together, fp32 [1 + R, 1].
        """
        state["threshold"].copy_(cutoffs[0])

    def update(self, state: RoutingState, statistics: PooledStatistics) -> None:  # noqa: B027 - optional hook
        """Update ``state`` in place from the global batch's statistics, once per optimizer step."""

    def aux_loss(self, logits: Tensor, state: RoutingState) -> Tensor | None:
        """Return a scalar to add to the training loss, differentiable in ``logits`` [B, S, E]; `None` for none."""
        return None

    def to_config(self) -> dict[str, Any]:
        """Return the rule as plain data: ``{"class_path": …, "init_args": {…}}``."""
        if not dataclasses.is_dataclass(self):
            raise UserError(f"model.routing: {type(self).__name__} must be a dataclass of its options.")
        path = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class_path": path, "init_args": dataclasses.asdict(self)}


def rule_from_config(config: Mapping[str, Any] | None) -> RoutingRule | None:
    """Return the rule that `RoutingRule.to_config` wrote down; `None` stands for the dense model.

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
