"""The normal distribution's quantiles, and the cutoff that a normal distribution of scores would have."""

from __future__ import annotations

from statistics import NormalDist

from torch import Tensor


def gaussian_cutoff(num_values: Tensor, total: Tensor, total_squares: Tensor, rate: float) -> Tensor:
    """mean + z·std, fp32 [E], with z the normal quantile of 1 − rate: a share ``rate`` of normal values lies above it.

    Args:
        num_values: [], N.
        total: fp64 [E], sum of the values.
        total_squares: fp64 [E], sum of their squares.
        rate: see `standard_normal_cutoff`.
    """
    mean = total / num_values
    std = (total_squares / num_values - mean.square()).clamp_min(0).sqrt()
    return (mean + standard_normal_cutoff(rate) * std).float()


def standard_normal_cutoff(rate: float) -> float:
    """The value above which a share ``rate`` in (0, 1] of N(0, 1) lies; finite for rate 1 too (that of 1 − 1e-6)."""
    return NormalDist().inv_cdf(1 - min(rate, 1 - 1e-6))
