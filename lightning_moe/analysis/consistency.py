"""Routing consistency of two checkpoints over the same text (the paper's Figs. 8 and 14).

An *edge* is a (layer, token, expert) with z = 1; the shared expert is none. Pooled over all edges A and B of the two:
weighted Jaccard |A ∩ B| / |A ∪ B| and Dice 2 |A ∩ B| / (|A| + |B|). For a single token its edges (of one layer, or of
all layers jointly) are compared and the mean over tokens taken: Jaccard and Dice of the sets (both empty: 1; one empty:
0), and Jensen–Shannon divergence (in bits) and total variation of the uniform distributions over the sets (both empty:
0; one empty: 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MEASURES = ("jaccard", "dice", "jsd", "tv")


def token_measures(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Return the measures of every token, fp64 [N], from its edges.

    Args:
        a: bool [N, K], edges of each token in one checkpoint.
        b: bool [N, K], edges of each token in the other.
    """
    in_a, in_b = a.sum(-1).double(), b.sum(-1).double()
    both = (a & b).sum(-1).double()
    empty = (in_a == 0) & (in_b == 0)
    one_empty = (in_a == 0) ^ (in_b == 0)
    p, q = 1 / in_a.clamp_min(1), 1 / in_b.clamp_min(1)  # the uniform distributions' values
    only_a, only_b = (in_a - both) * p, (in_b - both) * q  # probability where the other has none
    middle = (p + q) / 2
    shared = both * (p * (p / middle).log2() + q * (q / middle).log2())
    values = {
        "jaccard": both / (in_a + in_b - both).clamp_min(1),
        "dice": 2 * both / (in_a + in_b).clamp_min(1),
        "jsd": (only_a + only_b + shared) / 2,
        "tv": (only_a + only_b + both * (p - q).abs()) / 2,
    }
    for name, value in values.items():
        value[empty] = 1.0 if name in ("jaccard", "dice") else 0.0
        value[one_empty] = 0.0 if name in ("jaccard", "dice") else 1.0
    return values


@dataclass(frozen=True)
class Agreement:
    """How far two checkpoints agree, in one layer or in all jointly.

    Args:
        weighted_jaccard: Jaccard of the pooled edges; 1 if neither has any.
        weighted_dice: Dice of the pooled edges; 1 if neither has any.
        chance_jaccard: weighted Jaccard to expect if each expert took as many tokens as it does in either checkpoint,
            but independently.
        of_first: share of the first checkpoint's edges that the other has too, |A ∩ B| / |A|; 1 if neither has any.
        of_second: the same of the second's edges. With a fixed number of experts both are OLMoE's overlap, |A ∩ B| / k.
        chance_of_first: ``of_first`` to expect as for ``chance_jaccard``; the same for ``chance_of_second``.
        jaccard: mean over tokens; the same for ``dice``, ``jsd`` (bits) and ``tv``.
        num_tokens: number of compared tokens.
    """

    weighted_jaccard: float
    weighted_dice: float
    chance_jaccard: float
    of_first: float
    of_second: float
    chance_of_first: float
    chance_of_second: float
    jaccard: float
    dice: float
    jsd: float
    tv: float
    num_tokens: int


class Consistency:
    """The sums of one pair of checkpoints over any amount of text.

    Args:
        num_layers: number L of layers, in both.
        num_experts: number E of experts, in both.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_tokens = 0
        self._loads = torch.zeros(3, num_layers, num_experts, dtype=torch.float64)  # of a, of b, of both
        self._sums = torch.zeros(num_layers + 1, len(MEASURES), dtype=torch.float64)  # the last row: layers jointly

    def update(self, a: Tensor, b: Tensor, valid: Tensor) -> None:
        """Add a batch: experts bool [B, S, L, E] in both checkpoints, and valid bool [B, S]."""
        a, b = a[valid], b[valid]  # [N, L, E]
        self.num_tokens += len(a)
        self._loads += torch.stack([a.sum(0), b.sum(0), (a & b).sum(0)]).double()
        parts = [(a[:, layer], b[:, layer]) for layer in range(a.shape[1])] + [(a.flatten(1), b.flatten(1))]
        for index, part in enumerate(parts):
            values = token_measures(*part)
            self._sums[index] += torch.stack([values[name].sum() for name in MEASURES])

    def result(self) -> tuple[list[Agreement], Agreement]:
        """Return the agreement per layer, and over all layers."""
        layers = range(self._loads.shape[1])
        return [self._agreement(self._loads[:, layer], layer) for layer in layers], self._agreement(self._loads, -1)

    def _agreement(self, loads: Tensor, index: int) -> Agreement:
        in_a, in_b, both = (float(load.sum()) for load in loads)
        tokens = max(1, self.num_tokens)
        chance = float((loads[0] * loads[1]).sum()) / tokens
        union, total = in_a + in_b - both, in_a + in_b
        return Agreement(
            both / union if union else 1.0,
            2 * both / total if total else 1.0,
            chance / (total - chance) if total else 1.0,
            of_first=_share(both, in_a, total),
            of_second=_share(both, in_b, total),
            chance_of_first=_share(chance, in_a, total),
            chance_of_second=_share(chance, in_b, total),
            **dict(zip(MEASURES, (self._sums[index] / tokens).tolist(), strict=True)),
            num_tokens=self.num_tokens,
        )


def _share(part: float, whole: float, total: float) -> float:
    """Return part / whole: 1 if neither checkpoint has edges, 0 if the other one alone has."""
    if not total:
        return 1.0
    return part / whole if whole else 0.0
