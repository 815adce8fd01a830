"""Which domain of the text a token belongs to."""

from collections.abc import Sequence

import numpy as np


class TokenDomains:
    """The domain of each token of a row of documents. A document owns its tokens, its `<|endoftext|>` included.

    Args:
        starts: Token index of each document's `<|endoftext|>`, ascending from 0.
        domains: Domain of each document.
    """

    def __init__(self, starts: Sequence[int], domains: Sequence[str]) -> None:
        #: the domains, sorted, so that their numbers do not depend on the order of the documents
        self.names = tuple(sorted(set(domains)))
        number = {name: index for index, name in enumerate(self.names)}
        numbers = np.array([number[domain] for domain in domains], np.int64)
        first = np.flatnonzero(np.diff(numbers, prepend=-1))  # of each run of documents of the same domain
        self._starts, self._numbers = np.array(starts, np.int64)[first], numbers[first]

    def of(self, start: int, stop: int) -> np.ndarray:
        """Return the index in `names` of the domain of the tokens from `start` to `stop`, int64 [stop − start]."""
        return self._numbers[np.searchsorted(self._starts, np.arange(start, stop), side="right") - 1]
