"""The order in which figures show the experts of a layer."""

from __future__ import annotations

from torch import Tensor


def by_mean(means: Tensor) -> Tensor:
    """Return the experts of each layer, the highest mean first, equal ones by their numbers: int64 [L, E] of [L, E].

    Experts of different layers have nothing to do with each other, so each layer has an order of its own.
    """
    return means.argsort(dim=-1, descending=True, stable=True)
