"""The exact k-th largest of each column of a stream of scores that need not fit into the memory.

Shape letters: N tokens of a batch, C columns, R rates, B bins of a histogram.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_moe.routing.pooling import (
    digit_histogram,
    from_top,
    key_to_float,
    ordered_key,
    pooled_kth_largest,
    refuse_nan,
    sorted_columns,
    target_counts,
)

MEMORY = 2**30  # bytes of scores that are held: 524,288 tokens and 512 experts
_DIGITS = (11, 11, 10)  # of a 32-bit key, from the top


def streamed_kth_largest(
    read: Callable[[], Iterable[Tensor]], rates: Sequence[float] | Callable[[], Tensor], memory: int = MEMORY
) -> Tensor:
    """Return the exact k-th largest values of each column; k = `target_count` of all rows.

    Scores of up to ``memory`` bytes are held and read once. Longer streams are read three times, for a radix selection
    on the order-preserving bit patterns of the values: each reading counts one more digit. Then the counts are all that
    is held (8 bytes · 2048 · columns · rates), however long the stream is. Both give the same bits.

    Args:
        read: function that starts a reading of the scores, fp32 [N, C]; every reading gives the same.
        rates: R shares of the rows that lie at or above the results, each in [0, 1]; or a function that returns them
            for each column, fp64 [R, C], and is called after the first reading. At least one row counts.
        memory: bytes of scores to hold at most.

    Returns:
        fp32 [R, C].

    Raises:
        TrainingDiverged: there is NaN among the scores.
    """
    held: list[Tensor] = []
    counts_CRB = None
    for scores_NC in read():
        if counts_CRB is None and (sum(map(len, held)) + len(scores_NC)) * scores_NC.shape[1] * 4 <= memory:
            held.append(scores_NC)
            continue
        counts_CRB = _with_digits(counts_CRB, [*held, scores_NC], None, 0, _DIGITS[0])
        held = []
    if counts_CRB is None:
        scores_NC = torch.cat(held)
        if not callable(rates):
            return pooled_kth_largest([scores_NC], [rates])[0]
        columns = pooled_kth_largest(scores_NC.split(1, dim=1), rates().t().tolist())
        return torch.cat(columns, dim=1)
    wanted_CR = rates().t() if callable(rates) else torch.tensor([list(rates)], dtype=torch.float64)
    counts_CRB = counts_CRB.expand(-1, wanted_CR.shape[1], -1)  # all rates share the first reading
    remaining_CR = target_counts(counts_CRB[:, :1].sum(-1), wanted_CR)
    prefix_CR, used = torch.zeros_like(remaining_CR), 0
    for bits in _DIGITS:
        if used:
            counts_CRB = _with_digits(None, read(), prefix_CR, used, bits)
        used += bits
        from_top_CRB = from_top(counts_CRB)
        position_CR = (from_top_CRB < remaining_CR.unsqueeze(-1)).sum(-1)  # bins passed before the k-th is reached
        passed_CR = from_top_CRB.gather(-1, (position_CR - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
        remaining_CR = remaining_CR - torch.where(position_CR > 0, passed_CR, 0)
        prefix_CR = (prefix_CR << bits) | ((1 << bits) - 1 - position_CR)
    return key_to_float(prefix_CR).t()


def _with_digits(
    counts: Tensor | None, batches: Iterable[Tensor], prefix: Tensor | None, used: int, bits: int
) -> Tensor:
    """Add the counts int64 [C, R, B] of the next digit of those keys that begin with ``prefix`` int64 [C, R]."""
    for scores_NC in batches:
        refuse_nan([scores_NC.isnan().sum(0)])
        keys_CN = ordered_key(sorted_columns(scores_NC))
        known_CR = torch.zeros(len(keys_CN), 1, dtype=torch.int64) if prefix is None else prefix
        found_CRB = digit_histogram(keys_CN, known_CR, used + bits, bits).long()
        counts = found_CRB if counts is None else counts + found_CRB
    assert counts is not None
    return counts
