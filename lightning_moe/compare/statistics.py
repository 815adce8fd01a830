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
        mean: mean.
        half_width: half of the width of the mean's 95% confidence interval; `None` for a single value, which says
            nothing about the spread.
        count: number of values.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def excludes_zero(self) -> bool | None:
        """Whether 0 lies outside of the interval; `None` without an interval."""
        return None if self.half_width is None else abs(self.mean) > self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and Student's t-interval, ± t(97.5%, n − 1) · s / √n.

    The values are taken as independent draws of a normal distribution. With two values t is 12.7, so two seeds say
    little.
    """
    from scipy.stats import t

    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Estimate(mean, None, count)
    quantile = float(t.ppf(0.5 + CONFIDENCE / 2, count - 1))
    return Estimate(mean, quantile * statistics.stdev(values) / math.sqrt(count), count)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Return ``values`` − ``baseline``, seed by seed; `None` without a common seed.

    Pairing removes what a seed does to both, such as the order of the text.

    Args:
        values: values by seed.
        baseline: values of the baseline by seed.
    """
    common = sorted(values.keys() & baseline.keys())
    return estimate([values[seed] - baseline[seed] for seed in common]) if common else None
