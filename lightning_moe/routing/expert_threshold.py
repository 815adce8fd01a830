"""Expert Threshold routing (ET; arXiv 2603.11535, Algorithm 1): a token goes to an expert when its logit exceeds a
stored threshold.

    z_{t,i} = 1{ r_{t,i} > c_i }            with the old c_i, then
    c_i     = β c_i + (1 − β) · (k-th largest of r_{·,i} over the global batch)

The choice depends on this token and a stored number only. So it is causal, it needs no auxiliary loss, the load is
balanced in expectation, and the compute per token varies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.routing.base import CausalChoice, Phase, Pool, RoutingState, Selection
from lightning_moe.routing.expert_choice import check_pool, choose_top_tokens
from lightning_moe.routing.pooling import top_count_mask
from lightning_moe.routing.threshold import ThresholdTracking


@dataclass(frozen=True)
class ExpertThreshold(ThresholdTracking):
    """Thresholds choose, in training and at inference.

    Args:
        capacity_factor: bound C on the load; null for none. In training each expert takes ⌈(1−C)k⌉ to ⌊(1+C)k⌋ tokens
            of a micro-batch. Above that, the lowest-scoring are dropped. Below it, the next-highest are added with
            their real gate, so that a starved expert gets gradient and can recover. Never applied at inference.
        warmup_pool: tokens among which experts choose during the warm-up; see ``pool`` of `ExpertChoice`.
    """

    capacity_factor: float | None = 0.5
    warmup_pool: Pool = "micro_batch"

    has_warmup = True
    causal_choice = CausalChoice.THRESHOLD

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.capacity_factor is not None and not self.capacity_factor >= 0:
            raise UserError(f"model.routing.capacity_factor={self.capacity_factor!r}: must be 0 or more, or null.")
        check_pool("warmup_pool", self.warmup_pool)

    def pool_in(self, phase: Phase) -> Pool | None:
        return self.warmup_pool if phase is Phase.WARMUP else None

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        if phase is Phase.WARMUP:  # logits grow too fast for the average yet, so experts choose
            return choose_top_tokens(logits, state, self.warmup_pool)
        above = logits > state["threshold"]
        if phase is Phase.CAUSAL or self.capacity_factor is None:
            return Selection(above)
        return self._within_capacity(logits, above, state)

    def _within_capacity(self, logits: Tensor, above: Tensor, state: RoutingState) -> Selection:
        num_tokens = logits.shape[0] * logits.shape[1]
        assert self.capacity_factor is not None
        k = num_tokens * state.rate
        # rounded first: (1 − 0.7)·10 is 3.0000000000000004 in floating point, and its ceiling would be 4
        upper = min(num_tokens, math.floor(round((1 + self.capacity_factor) * k, 6)))
        lower = min(upper, max(0, math.ceil(round((1 - self.capacity_factor) * k, 6))))
        selected = above.sum((0, 1))  # [E]
        bounded = selected.clamp(lower, upper)
        # the tokens above an expert's threshold are its `selected` best ones, so the bounded set is its `bounded` best
        mask = top_count_mask(logits.reshape(num_tokens, -1), bounded, max(1, upper)).reshape(logits.shape)
        return Selection(
            mask,
            num_dropped=(selected - bounded).clamp_min(0),
            num_added=(bounded - selected).clamp_min(0),
            lower_bound=lower,
            max_pairs=max(1, upper * logits.shape[-1]),
        )
