"""Means with Student's t-intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over runs.

    Args:
        mean: the mean.
        half_width: of the 95% confidence interval of the mean; null for a single value, which says nothing of spread.
        count: number of values.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def excludes_zero(self) -> bool | None:
        """Whether 0 lies outside of the interval; null without an interval."""
        return None if self.half_width is None else abs(self.mean) > self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's t-interval, ± t(97.5%, n − 1) · s / √n.

    It takes the values as independent draws of a normal distribution. With two values t is 12.7: that is what two
    seeds are worth.
    """
    from scipy.stats import t

    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Estimate(mean, None, count)
    quantile = float(t.ppf(0.5 + CONFIDENCE / 2, count - 1))
    return Estimate(mean, quantile * statistics.stdev(values) / math.sqrt(count), count)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """``values`` − ``baseline``, seed by seed; null without a common seed.

    Pairing takes out what a seed does to both, such as the order of the text.

    Args:
        values: by seed.
        baseline: by seed.
    """
    common = sorted(values.keys() & baseline.keys())
    return estimate([values[seed] - baseline[seed] for seed in common]) if common else None
