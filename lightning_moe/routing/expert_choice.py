"""Expert choice (EC; Zhou et al. 2022): each expert takes its k best tokens of a pool.

Perfectly balanced, but not causal: whether a token is chosen depends on the other tokens of the pool, later ones
included. So EC is *evaluated* by the threshold rule (paper: "causal protocol"): during training the k-th largest logit
of the global batch is tracked by the same moving average as in ET, and at inference a token goes where its logit
exceeds that average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.routing.base import Phase, RoutingState, Selection, target_count
from lightning_moe.routing.pooling import top_count_mask
from lightning_moe.routing.threshold import ThresholdTracking

Pool = Literal["micro_batch", "sequence"]


def choose_top_tokens(logits: Tensor, state: RoutingState, pool: Pool) -> Selection:
    """Exactly k tokens per expert and pool: k = pool tokens × num_experts_per_token / num_experts, rounded half up.

    Args:
        logits: fp32 [B, S, E].
        state: gives the rate.
        pool: ``micro_batch`` pools all B·S tokens of this forward pass, ``sequence`` each sequence by itself.
    """
    pooled = logits if pool == "sequence" else logits.reshape(1, -1, logits.shape[-1])
    k = target_count(pooled.shape[1], state.rate)
    mask = top_count_mask(pooled, k, k)
    return Selection(mask.reshape(logits.shape))


@dataclass(frozen=True)
class ExpertChoice(ThresholdTracking):
    """Experts choose tokens in training; thresholds choose at inference.

    Args:
        pool: the tokens among which an expert chooses: ``micro_batch`` (this rank, this accumulation step) or
            ``sequence``. A pool over ranks or accumulation steps would need the other logits before the layer's output
            can be computed.
        ema_decay: decay β of the tracked threshold, per optimizer step.
    """

    pool: Pool = "micro_batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in ("micro_batch", "sequence"):
            raise UserError(f"model.routing.pool={self.pool!r}: must be 'micro_batch' or 'sequence'.")

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        if phase is Phase.CAUSAL:
            return Selection(logits > state["threshold"])
        return choose_top_tokens(logits, state, self.pool)
