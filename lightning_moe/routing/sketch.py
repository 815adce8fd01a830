"""A compact sketch of each expert's score distribution: what the threshold would be at other rates.

Beside the threshold of the target rate ρ, the state keeps the thresholds of a few other rates, ρ/8 … 8ρ in factors of
two, by the same moving average of pooled cutoffs. Between two of them the threshold is linear in the normal quantile of
the rate. That is exact for normal scores of any mean and width, and at the stored rates for any scores.
`model.inference_num_experts_per_token` reads the sketch.
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
    """Return the rates of the rows of the state's ``sketch`` [R, E], ascending: ρ/8 … 8ρ without ρ, and below 1."""
    return tuple(rate * factor for factor in _FACTORS if rate * factor < 1)


def threshold_at(state: RoutingState, num_experts_per_token: float) -> Tensor:
    """Return the thresholds fp32 [E] that send a token to this many experts on average.

    Args:
        state: state with the ``threshold`` [E] of its target rate and the ``sketch`` [R, E].
        num_experts_per_token: wanted mean, within the range of the sketch.

    Raises:
        UserError: the wanted mean is outside of that range.
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
