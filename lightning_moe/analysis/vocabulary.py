"""Vocabulary specialisation (Section 5.4 of OLMoE, arXiv 2409.02060): which token ids an expert serves."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lightning_moe.analysis.observe import Observation
from lightning_moe.analysis.sparse_counts import SparseCounts

FEWEST_OCCURRENCES = 10  # of a token id; the specialisation of an id that occurs once is always 1
#: ids that a position has: its own, that of the next token, and that of the model's prediction
KINDS = ("input", "next", "predicted")


@dataclass(frozen=True)
class Mean:
    """The mean specialisation of a layer over token ids.

    Args:
        value: mean over the ids that occur often enough.
        by_chance: the same if the experts of the layer, with their loads, were dealt out without regard to the ids.
        of_all: mean over all ids (OLMoE's definition).
        num_ids: number of ids that occur often enough.
    """

    value: float
    by_chance: float
    of_all: float
    num_ids: int


@dataclass(frozen=True)
class Entry:
    """A token id of an expert.

    Args:
        token: token id.
        count: occurrences that took the expert, N_{x,i}.
        of_expert: their share of the expert's tokens, N_{x,i} / N_i.
        of_token: their share of the id's occurrences, N_{x,i} / N_x.
    """

    token: int
    count: int
    of_expert: float
    of_token: float


class Vocabulary:
    """Counts of (layer, expert, token id).

    Args:
        num_layers: number L of MoE layers.
        num_experts: number E of experts.
        vocab_size: number V of token ids of the model.

    Attributes:
        occurrences: int64 [V], N_x.
    """

    def __init__(self, num_layers: int, num_experts: int, vocab_size: int) -> None:
        self.num_layers, self.num_experts, self.vocab_size = num_layers, num_experts, vocab_size
        self.occurrences = torch.zeros(vocab_size, dtype=torch.int64)
        self._first = {kind: SparseCounts() for kind in KINDS}  # of the expert with a token's largest gate
        self._chosen = SparseCounts()  # of all experts of a token

    def update(self, seen: Observation) -> None:
        """Add a batch."""
        experts, tokens = seen.experts[seen.valid], seen.tokens[seen.valid]  # [N, L, E], [N]
        self.occurrences += torch.bincount(tokens, minlength=self.vocab_size)
        token, layer, expert = experts.nonzero().unbind(1)
        self._chosen.add(self._key(layer, expert, tokens[token]))
        first = torch.where(experts, seen.gates[seen.valid], -torch.inf).argmax(-1)  # [N, L]
        token, layer = experts.any(-1).nonzero().unbind(1)
        for kind, ids in zip(KINDS, (seen.tokens, seen.next_tokens, seen.predicted), strict=True):
            if ids is not None:
                self._first[kind].add(self._key(layer, first[token, layer], ids[seen.valid][token]))

    def _key(self, layer: Tensor, expert: Tensor, token: Tensor) -> Tensor:
        return (layer * self.num_experts + expert) * self.vocab_size + token

    def mean(self, kind: str, layer: int) -> Mean | None:
        """Return the mean over token ids x of max_i N_{x,i} / N_x, with the expert of a token's largest gate alone.

        Args:
            kind: which ids, of `KINDS`.
            layer: index of the layer.

        Returns:
            The mean; `None` if there are no ids of this kind, or if no token takes an expert of the layer.
        """
        keys, counts = self._first[kind].result()
        low, high = (number * self.num_experts * self.vocab_size for number in (layer, layer + 1))
        here = (keys >= low) & (keys < high)
        keys, counts = keys[here] - low, counts[here]
        if not len(keys):
            return None
        ids, place = torch.unique(keys % self.vocab_size, return_inverse=True)
        total = torch.zeros_like(ids).index_add_(0, place, counts)
        most = torch.zeros_like(ids).scatter_reduce_(0, place, counts, "amax")
        share = most.double() / total
        often = total >= min(FEWEST_OCCURRENCES, int(total.max()))
        load = torch.zeros(self.num_experts, dtype=torch.float64)
        load.index_add_(0, keys // self.vocab_size, counts.double())
        drawn = np.random.default_rng(0).multinomial(total[often].numpy(), (load / load.sum()).numpy()).max(-1)
        return Mean(
            float(share[often].mean()),
            float((drawn / total[often].numpy()).mean()),
            float(share.mean()),
            int(often.sum()),
        )

    def entries(self, most: int) -> dict[tuple[int, int], tuple[list[Entry], list[Entry]]]:
        """Return (layer, expert) → its most typical and its most frequent token ids, at most ``most`` of each.

        Typical are the ids with the largest share ``of_token`` among those that occur often enough, frequent those with
        the largest ``count``. Equal ones are in the order of count and id. Experts without a token are left out.
        """
        keys, counts = (values.numpy() for values in self._chosen.result())
        cell, token = np.divmod(keys, self.vocab_size)
        occurrences = self.occurrences.numpy()[token]
        of_token = counts / occurrences
        often = occurrences >= min(FEWEST_OCCURRENCES, int(self.occurrences.max()))
        # `lexsort` has its first key last
        typical = np.lexsort((token, -counts, -of_token, ~often, cell))
        frequent = np.lexsort((token, -counts, cell))
        found: dict[tuple[int, int], tuple[list[Entry], list[Entry]]] = {}
        starts = np.flatnonzero(np.diff(cell, prepend=-1))  # the keys are sorted, so are the cells
        for start, end in pairwise([*starts, len(cell)]):
            load = int(counts[start:end].sum())
            of_expert = [
                [
                    Entry(int(token[at]), int(counts[at]), int(counts[at]) / load, float(of_token[at]))
                    for at in order[start : min(end, start + most)]
                    if order is frequent or often[at]
                ]
                for order in (typical, frequent)
            ]
            found[divmod(int(cell[start]), self.num_experts)] = (of_expert[0], of_expert[1])
        return found
