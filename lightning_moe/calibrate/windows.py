"""Windows of a text for calibration and for measurements on what calibration has not seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightning_moe.data.sharded_tokens import ShardedTokens
from lightning_moe.errors import UserError

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Windows:
    """Batches int64 [B, length + 1] of the windows that begin at ``starts``; each iteration reads them anew."""

    tokens: np.ndarray | ShardedTokens
    length: int
    starts: list[int]

    @classmethod
    def spread(cls, tokens: np.ndarray | ShardedTokens, length: int, num_tokens: int) -> Windows:
        """Spread windows evenly over the whole text, about ``num_tokens`` in all."""
        there = (len(tokens) - 1) // length
        wanted = min(there, max(2, round(num_tokens / length)))
        return cls(tokens, length, [int(index * there / wanted) * length for index in range(wanted)])

    def __len__(self) -> int:
        return -(-len(self.starts) // self.batch_size)

    @property
    def batch_size(self) -> int:
        """Number of windows in a batch."""
        return max(1, BATCH_TOKENS // self.length)

    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, len(self.starts), self.batch_size):
            rows = [
                self.tokens[start : start + self.length + 1] for start in self.starts[first : first + self.batch_size]
            ]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))

    def split(self) -> tuple[Windows, Windows]:
        """Return every second window, which calibrates, and the others, which show what came of it.

        Raises:
            UserError: there are fewer than two windows.
        """
        if len(self.starts) < 2:
            raise UserError(
                f"--text: has {len(self.tokens)} tokens, but calibration takes at least two windows of "
                f"{self.length + 1} (--sequence_length and the token after it): give more text, or a smaller length."
            )
        return replace(self, starts=self.starts[::2]), replace(self, starts=self.starts[1::2])
