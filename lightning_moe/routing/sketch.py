"""A compact sketch of each expert's score distribution: what the threshold would be at other rates.

Beside the threshold of the target rate ρ, the state keeps the thresholds of a few other rates, ρ/8 … 8ρ in factors of
two, from the same pooled cutoffs and the same moving average. A rate between two of them is found by linear
interpolation over the normal quantile of the rate: exact for normal scores, whatever their mean and width, and at the
stored rates for scores of any distribution. `model.inference_num_experts_per_token` reads
it.
"""

from __future__ import annotations

import bisect

import torch
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.routing.base import RoutingState
from lightning_moe.routing.normal import standard_normal_cutoff

_FACTORS = (1 / 8, 1 / 4, 1 / 2, 2, 4, 8)


def sketch_rates(rate: float) -> tuple[float, ...]:
    """The rates of the rows of the state's ``sketch`` [R, E], ascending: ρ/8 … 8ρ without ρ, and below 1."""
    return tuple(rate * factor for factor in _FACTORS if rate * factor < 1)


def threshold_at(state: RoutingState, num_experts_per_token: float) -> Tensor:
    """The thresholds fp32 [E] that send a token to this many experts on average.

    Args:
        state: with ``threshold`` [E] of its target rate and ``sketch`` [R, E].
        num_experts_per_token: within the range of the sketch.

    Raises:
        UserError: it is outside of that range.
    """
    rate = num_experts_per_token / state.num_experts
    others = sketch_rates(state.rate)
    known = sorted([*others, state.rate])
    if not known[0] <= rate <= known[-1]:
        low, high = (f"{known[end] * state.num_experts:g}" for end in (0, -1))
        raise UserError(
            f"inference_num_experts_per_token={num_experts_per_token:g}: the checkpoint's sketch of the router's "
            f"scores reaches from {low} to {high}; for another number use `calibrate`."
        )
    rows = {other: state["sketch"][index] for index, other in enumerate(others)} | {state.rate: state["threshold"]}
    if rate in rows:
        return rows[rate].clone()
    upper = bisect.bisect(known, rate)
    below, above = known[upper - 1], known[upper]
    z_below, z, z_above = (standard_normal_cutoff(value) for value in (below, rate, above))
    return torch.lerp(rows[below], rows[above], (z - z_below) / (z_above - z_below))
