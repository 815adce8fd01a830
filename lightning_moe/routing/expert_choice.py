"""Expert choice (EC; Zhou et al. 2022): each expert takes its k best tokens of a pool.

The load is perfectly balanced, but the choice is not causal: it depends on the other tokens of the pool, later ones
included. So EC is *evaluated* by the threshold rule (paper: "causal protocol"). Training tracks the k-th largest logit
of the global batch by the same moving average as ET. At inference a token goes where its logit exceeds that average.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.ranks import world_size
from lightning_moe.routing.base import CausalChoice, Phase, Pool, RoutingState, Selection, target_count
from lightning_moe.routing.pooling import pooled_top_mask, top_count_mask
from lightning_moe.routing.threshold import ThresholdTracking


def check_pool(key: str, pool: Pool) -> None:
    """Raise `UserError` unless ``pool`` is a `Pool`."""
    if pool in ("sequence", "micro_batch", "global") or (type(pool) is int and pool >= 1):
        return
    raise UserError(
        f"model.routing.{key}={pool!r}: must be 'sequence', 'micro_batch', 'global', or a number of sequences."
    )


def choose_top_tokens(logits: Tensor, state: RoutingState, pool: Pool) -> Selection:
    """Choose k tokens per expert and pool: k = pool tokens × num_experts_per_token / num_experts, rounded half up.

    Args:
        logits: router logits, fp32 [B, S, E].
        state: state of the layer, for its rate.
        pool: tokens among which an expert chooses.

    Raises:
        UserError: the B sequences do not divide into pools.
    """
    batch, length, num_experts = logits.shape
    if pool == "global":
        mask = pooled_top_mask(logits.flatten(0, 1), state.rate).view(logits.shape)
        k = target_count(batch * length, state.rate)
        return Selection(mask, max_pairs=k * num_experts if world_size() == 1 else None)
    sequences = pool if isinstance(pool, int) else batch if pool == "micro_batch" else 1
    if batch % sequences:
        raise UserError(
            f"model.routing: pools of {sequences} sequences, but a micro-batch has {batch} on this rank: "
            "it must be a multiple."
        )
    pools = logits.reshape(-1, sequences * length, num_experts)
    k = target_count(pools.shape[1], state.rate)
    mask = top_count_mask(pools, k, k).reshape(logits.shape)
    return Selection(mask, max_pairs=k * num_experts * pools.shape[0])


@dataclass(frozen=True)
class ExpertChoice(ThresholdTracking):
    """Experts choose tokens in training; thresholds choose at inference.

    Args:
        pool: tokens among which an expert chooses: of each ``sequence``; of a number of neighbouring sequences of a
            micro-batch; of the ``micro_batch`` of this rank and accumulation step; or ``global``, of all ranks. There
            is no pool over accumulation steps: a layer's output is needed before the later ones have run.
    """

    pool: Pool = "micro_batch"

    causal_choice = CausalChoice.THRESHOLD

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool("pool", self.pool)

    def pool_in(self, phase: Phase) -> Pool | None:
        return None if phase is Phase.CAUSAL else self.pool

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        if phase is Phase.CAUSAL:
            return Selection(logits > state["threshold"])
        return choose_top_tokens(logits, state, self.pool)
