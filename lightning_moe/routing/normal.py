"""Quantiles of the normal distribution, and the cutoff that normally distributed scores would have."""

from __future__ import annotations

from statistics import NormalDist

from torch import Tensor


def gaussian_cutoff(num_values: Tensor, total: Tensor, total_squares: Tensor, rate: float) -> Tensor:
    """Return mean + z·std, fp32 [E], the value above which a share ``rate`` of normal values lies.

    Args:
        num_values: number N of values, [].
        total: sum of the values, fp64 [E].
        total_squares: sum of their squares, fp64 [E].
        rate: share in (0, 1]; z is the normal quantile of 1 − rate.
    """
    mean = total / num_values
    std = (total_squares / num_values - mean.square()).clamp_min(0).sqrt()
    return (mean + standard_normal_cutoff(rate) * std).float()


def standard_normal_cutoff(rate: float) -> float:
    """Return the value above which a share ``rate`` in (0, 1] of N(0, 1) lies; for rate 1, that of 1 − 1e-6."""
    return NormalDist().inv_cdf(1 - min(rate, 1 - 1e-6))
