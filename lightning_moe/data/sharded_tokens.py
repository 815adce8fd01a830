"""The tokens of several files as one row."""

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

MAPPED_AT_ONCE = 256
"""Number of files that are mapped at the same time: each takes a file descriptor."""


class ShardedTokens:
    """Files of token ids, one after the other: `tokens[a:b]` is an array [b − a] (no copy inside one file).

    The borders of the files are invisible. A file is memory-mapped when it is first read. A pickled copy maps the files
    again itself.

    Args:
        paths: The files, in order.
        counts: Number of tokens in each.
        dtype: NumPy type of a token, such as `<u2`.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], dtype: str) -> None:
        self.paths = list(paths)
        self.dtype = np.dtype(dtype)
        self.starts = np.cumsum([0, *counts])
        self._open()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens[{start}:{stop}:{step}]: only consecutive tokens can be read")
        if start >= stop:
            return np.empty(0, self.dtype)
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, stop, side="left")) - 1
        parts = []
        for number in range(first, last + 1):
            offset = int(self.starts[number])
            if self.starts[number + 1] > offset:  # an empty file cannot be mapped
                parts.append(self._map(number)[max(start - offset, 0) : stop - offset])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def tolist(self) -> list[int]:
        """Return all tokens, in memory."""
        ids: list[int] = self[:].tolist()
        return ids

    def _open(self) -> None:
        self._map = lru_cache(MAPPED_AT_ONCE)(partial(_map_file, self.paths, self.dtype))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_map"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _map_file(paths: Sequence[Path], dtype: np.dtype, number: int) -> np.ndarray:
    return np.memmap(paths[number], dtype=dtype, mode="r")
