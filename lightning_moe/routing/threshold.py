"""The stored threshold of each expert: a bias-corrected moving average of the pooled cutoff."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.routing.base import CutoffEstimator, PooledStatistics, RoutingRule, RoutingState
from lightning_moe.routing.moving_average import MovingAverage
from lightning_moe.routing.normal import standard_normal_cutoff
from lightning_moe.routing.sketch import sketch_rates, threshold_at


@dataclass(frozen=True)
class ThresholdTracking(MovingAverage, RoutingRule):
    """Base of the rules that track thresholds: expert choice and expert threshold.

    State: ``threshold`` fp32 [E], the bias-corrected moving average of the cutoff, which the forward pass reads;
    ``ema_weight`` fp32 [], see `MovingAverage`; ``cutoff`` fp32 [E], that of the last global batch; ``sketch`` fp32
    [R, E], the same average at R other rates (`routing.sketch`).

    Before the first update ``threshold`` is the normal quantile of the target rate, so that no expert starts flooded: a
    fresh router has N(0, 1) logits (rows N(0, 1/d), inputs of unit mean square).

    Args:
        ema_decay: decay β per optimizer step; its memory is 1/(1−β) steps (paper: 0.999 over ~20,000 steps).
        ema_half_life_tokens: memory in tokens instead of ema_decay, see `MovingAverage`.
        estimator: cutoff of a global batch: ``kth_largest``, which is exact; or ``gaussian``, mean + z·std of the
            logits with z the normal quantile of 1 − rate, which is cheaper, and biased if the logits are not normal.
    """

    estimator: Literal["kth_largest", "gaussian"] = "kth_largest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator not in ("kth_largest", "gaussian"):
            raise UserError(f"model.routing.estimator={self.estimator!r}: must be 'kth_largest' or 'gaussian'.")

    @property
    def cutoff_estimator(self) -> CutoffEstimator:
        return self.estimator

    def initial_state(self, num_experts: int, num_experts_per_token: float) -> Mapping[str, Tensor]:
        rate = num_experts_per_token / num_experts
        prior = torch.full((num_experts,), standard_normal_cutoff(rate))
        sketch = torch.tensor([[standard_normal_cutoff(other)] * num_experts for other in self.sketch_rates(rate)])
        return {"threshold": prior, "cutoff": prior.clone(), "sketch": sketch, **self.initial_average()}

    def sketch_rates(self, rate: float) -> tuple[float, ...]:
        return sketch_rates(rate)

    def set_inference_num_experts_per_token(self, state: RoutingState, value: float) -> None:
        """Set the thresholds by interpolation in the sketch (`routing.sketch.threshold_at`)."""
        state["threshold"].copy_(threshold_at(state, value))

    def set_thresholds(self, state: RoutingState, cutoffs: Tensor) -> None:
        """Set thresholds and sketch; ``ema_weight`` becomes 1, so that training goes on from these thresholds."""
        state["threshold"].copy_(cutoffs[0])
        state["cutoff"].copy_(cutoffs[0])
        state["sketch"].copy_(cutoffs[1:])
        state["ema_weight"].fill_(1)

    def update(self, state: RoutingState, statistics: PooledStatistics) -> None:
        assert statistics.cutoff is not None
        state["cutoff"].copy_(statistics.cutoff)
        assert statistics.sketch is not None
        self.average(state, statistics.num_tokens, threshold=statistics.cutoff, sketch=statistics.sketch)
