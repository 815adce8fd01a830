"""Counts of numbers from a range that is too large for an array, of which few occur."""

from __future__ import annotations

import torch
from torch import Tensor


class SparseCounts:
    """How often each number was added. What is kept grows with the different numbers, not with all of them."""

    def __init__(self) -> None:
        empty = torch.zeros(0, dtype=torch.int64)
        self._keys, self._counts = empty, empty
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, keys: Tensor) -> None:
        """Count numbers, int64 [N]."""
        self._waiting.append(torch.unique(keys, return_counts=True))
        if sum(len(waiting) for waiting, _ in self._waiting) > len(self._keys):  # so that merging costs little
            self._merge()

    def _merge(self) -> None:
        keys, counts = (
            torch.cat(parts) for parts in zip((self._keys, self._counts), *self._waiting, strict=True)
        )  # fmt: skip
        self._keys, place = torch.unique(keys, return_inverse=True)
        self._counts = torch.zeros_like(self._keys).index_add_(0, place, counts)
        self._waiting = []

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the different numbers in ascending order and how often each was added, int64 [K] each."""
        if self._waiting:
            self._merge()
        return self._keys, self._counts
