"""The colour between the trials of a figure over two parameters."""

from __future__ import annotations

import numpy as np

WIDTH = 0.1  # standard deviation of the weights, in the length of an axis
REACH = 2.0  # widths around a trial that get a colour
FEWEST = 6  # trials below which the colour between them would be invented


def kernel_mean(points: np.ndarray, values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Average values around each place of a grid, with Gaussian weights of the distance (Nadaraya and Watson's mean).

    It follows single trials less than an interpolation does, so that the values of other parameters and of the seed
    do not make hills.

    Args:
        points: places of the trials, float64 [trials, 2], both axes from 0 to 1.
        values: values of the trials, float64 [trials].
        grid: places to compute, float64 [places, 2].

    Returns:
        Float64 [places]; NaN where no trial is within ``REACH`` widths.
    """
    squares = ((grid[:, None] - points[None]) ** 2).sum(-1) / WIDTH**2
    nearest = squares.min(1, keepdims=True)
    weights = np.exp((nearest - squares) / 2)  # relative to the nearest trial, so that no sum is 0
    mean = np.asarray(weights @ values / weights.sum(1))
    mean[nearest[:, 0] > REACH**2] = np.nan
    return mean
