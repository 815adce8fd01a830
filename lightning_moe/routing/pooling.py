"""Exact top-k inside a pool, and the exact k-th largest of a pool that is spread over ranks and micro-batches.

Among equal scores the earlier token of the pool wins, so that exactly k tokens are chosen. A k that is not whole is
rounded half up (`routing.base.target_count`).

Shape letters: N tokens, E experts (columns of a chunk), C columns of all chunks, K the largest count, R rates of a
chunk, T targets (one for each chunk, rate and column), B bins of a histogram, P ranks. A local name that ends in such
letters has that shape, after any leading dimensions: ``scores_EN``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.errors import TrainingDiverged
from lightning_moe.ranks import world_size
from lightning_moe.routing.base import target_count
from lightning_moe.routing.opaque import opaque

_RADIX_BITS = (11, 7, 7, 7)  # of a 32-bit key, from the top: 4 rounds, histograms of 2048, then 128 counts


def top_count_mask(scores: Tensor, counts: Tensor | int, max_count: int) -> Tensor:
    """Mark the ``counts`` largest scores of each column.

    Args:
        scores: pools along dimension -2, fp32 [..., N, E].
        counts: number of scores to mark in each column, from 0 to ``max_count``: an int, or int64 [..., E].
        max_count: bound on ``counts`` that is known without waiting for the device, 1 ≤ max_count ≤ N.

    Returns:
        bool [..., N, E] with exactly ``counts`` true values per column; ties go to the earlier token.
    """
    if isinstance(counts, int):
        return _top_count_mask(scores, None, counts)
    return _top_count_mask(scores, counts, max_count)


def _empty_mask(scores: Tensor, counts: Tensor | None, max_count: int) -> Tensor:
    scores_EN = scores.transpose(-1, -2)
    return scores_EN.new_empty(scores_EN.shape, dtype=torch.bool).transpose(-1, -2)


@opaque(_empty_mask)
def _top_count_mask(scores: Tensor, counts: Tensor | None, max_count: int) -> Tensor:
    """Do the work of `top_count_mask`; without ``counts``, ``max_count`` scores are marked."""
    scores_EN = scores.transpose(-1, -2).contiguous()
    top_EK = scores_EN.topk(max_count, dim=-1, sorted=True).values
    if counts is None:
        last_E1 = top_EK[..., -1:]
        counts_E1: Tensor | int = max_count
    else:
        counts_E1 = counts.unsqueeze(-1)
        last_E1 = top_EK.gather(-1, (counts_E1 - 1).clamp_min(0))
        last_E1 = torch.where(counts_E1 > 0, last_E1, torch.inf)
    above_EN = scores_EN > last_E1
    tied_EN = scores_EN == last_E1
    mask_EN = above_EN | (tied_EN & (tied_EN.cumsum(-1) <= counts_E1 - above_EN.sum(-1, keepdim=True)))
    return mask_EN.transpose(-1, -2)


def pooled_top_mask(scores: Tensor, rate: float) -> Tensor:
    """Mark the k = `target_count` largest scores of each column of a pool that is spread over all ranks.

    The pool's tokens are ordered by rank, and ties go to the earlier token. Collective: four all-reduces and one
    all-gather, whose size does not depend on the number of tokens.

    Args:
        scores: part of the pool on this rank, fp32 [N_local, E].
        rate: share of the pool to mark, in (0, 1].

    Returns:
        bool [N_local, E] with exactly k true values per column over all ranks.
    """
    if world_size() > 1:
        return _mask_over_ranks(scores, rate)
    k = target_count(scores.shape[0], rate)
    return top_count_mask(scores, k, k)


@opaque(lambda scores, rate: torch.empty_like(scores, dtype=torch.bool))
def _mask_over_ranks(scores: Tensor, rate: float) -> Tensor:
    """Do the work of `pooled_top_mask` for several ranks."""
    num_ranks = world_size()
    last_E: Tensor = pooled_kth_largest([scores], [[rate]])[0][0]
    above_NE, tied_NE = scores > last_E, scores == last_E
    counts_3E = torch.stack(
        [above_NE.sum(0), tied_NE.sum(0), torch.full_like(last_E, scores.shape[0], dtype=torch.int64)]
    )
    gathered = counts_3E.new_empty(num_ranks * 3, scores.shape[1])
    dist.all_gather_into_tensor(gathered, counts_3E)
    num_above_PE, num_tied_PE, num_tokens_PE = gathered.view(num_ranks, 3, -1).unbind(1)
    wanted_E = _target_counts(num_tokens_PE.sum(0), rate) - num_above_PE.sum(0) - num_tied_PE[: dist.get_rank()].sum(0)
    return above_NE | (tied_NE & (tied_NE.cumsum(0) <= wanted_E))


def pooled_kth_largest(
    chunks: Sequence[Tensor],
    rates: Sequence[Sequence[float]],
    offsets: Sequence[int] | None = None,
) -> list[Tensor]:
    """Return the exact k-th largest values of each column, pooled over all ranks; k = `target_count` of the pool.

    One process selects among its rows. Several make a radix selection on the order-preserving bit patterns of the fp32
    values: four rounds, each ONE all-reduce for all chunks together (2048 counts per column in the first, 128 per
    column and rate in the others), whatever the number of tokens. Both give the same bits.

    Args:
        chunks: one fp32 [N_local, C] tensor per layer (all micro-batches of the step concatenated). N_local is the same
            for all chunks of a rank and may differ between ranks.
        rates: for each chunk, R shares of the pool that lie at or above the results, each in (0, 1].
        offsets: for each chunk, places below the k-th: 1 for the (k+1)-th largest (at most the N-th); `None` for none.

    Returns:
        One fp32 [R, C] tensor per chunk; R may differ between chunks.

    Raises:
        TrainingDiverged: a chunk holds NaN, which has no order. All ranks raise it, whichever holds the NaN.
    """
    offsets = [0] * len(chunks) if offsets is None else offsets
    if world_size() == 1:
        _refuse_nan([chunk.isnan().sum(0) for chunk in chunks])
        results = []
        for chunk, of_chunk, offset in zip(chunks, rates, offsets, strict=True):
            n = chunk.shape[0]
            positions = [n - min(target_count(n, rate) + offset, n) for rate in of_chunk]  # from below
            results.append(_order_statistics(chunk, positions) + 0.0)  # -0.0 counts as 0.0, as in `_ordered_key`
        return results
    columns = [chunk.shape[1] for chunk in chunks]
    keys = [_ordered_key(_sorted_columns(chunk)) for chunk in chunks]  # sorted upwards
    # one target per chunk, rate and column, in this order
    targets = [len(of_chunk) * num for of_chunk, num in zip(rates, columns, strict=True)]
    device = chunks[0].device
    rates_T = torch.tensor(
        [rate for of_chunk, num in zip(rates, columns, strict=True) for rate in of_chunk for _ in range(num)],
        dtype=torch.float64,
        device=device,
    )
    offsets_T = torch.tensor(offsets, device=device).repeat_interleave(torch.tensor(targets, device=device))
    remaining_T = prefix_T = torch.zeros_like(offsets_T)
    used = 0
    for bits in _RADIX_BITS:
        used += bits
        bins = 1 << bits
        if used == bits:  # all rates share the first round, which also counts N, k and NaN
            local = [_digit_histogram(key_EN, torch.zeros_like(key_EN[:, 0]), used, bits) for key_EN in keys]
            nan_C1 = torch.cat([chunk.isnan().sum(0, dtype=torch.int32) for chunk in chunks]).unsqueeze(-1)
            histogram_CB = torch.cat([torch.cat(local), nan_C1], dim=1)
            dist.all_reduce(histogram_CB)
            _refuse_nan(list(histogram_CB[:, -1].split(columns)))
            of_chunks = _from_top(histogram_CB[:, :-1]).split(columns)
            from_top_TB = torch.cat([part.repeat(len(r), 1) for part, r in zip(of_chunks, rates, strict=True)])
            num_tokens_T = from_top_TB[:, -1]
            remaining_T = (_target_counts(num_tokens_T, rates_T) + offsets_T).minimum(num_tokens_T)
        else:
            histogram_TB = torch.cat(
                [
                    _digit_histogram(key_EN, of_rate, used, bits)
                    for key_EN, of_chunk in zip(keys, prefix_T.split(targets), strict=True)
                    for of_rate in of_chunk.split(key_EN.shape[0])
                ]
            )
            dist.all_reduce(histogram_TB)
            from_top_TB = _from_top(histogram_TB)
        position_T = (from_top_TB < remaining_T.unsqueeze(-1)).sum(-1)  # bins passed before the k-th value is reached
        passed_T = from_top_TB.gather(-1, (position_T - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
        above_T = torch.where(position_T > 0, passed_T, 0)
        remaining_T = remaining_T - above_T
        prefix_T = (prefix_T << bits) | (bins - 1 - position_T)
    found = _key_to_float(prefix_T).split(targets)
    return [values.view(len(of_chunk), -1) for values, of_chunk in zip(found, rates, strict=True)]


def _order_statistics(chunk: Tensor, positions: list[int]) -> Tensor:
    """Return the values [R, C] at ``positions`` (0 is the lowest) of each sorted column of ``chunk`` [N, C]."""
    if chunk.device.type == "cpu":  # several positions in one pass: five cost as much as one kthvalue
        partitioned = np.partition(chunk.t().contiguous().numpy(), sorted(set(positions)), axis=-1)
        return torch.from_numpy(partitioned[:, positions].T.copy())
    return _sorted_columns(chunk)[:, positions].t()


def _refuse_nan(counts: Sequence[Tensor]) -> None:
    """Raise `TrainingDiverged` if any of the NaN ``counts`` [C] of the chunks is not 0."""
    if not torch.stack([count.sum() for count in counts]).any():
        return
    index, count = next((index, count) for index, count in enumerate(counts) if count.any())
    column = int(count.nonzero()[0])
    raise TrainingDiverged(
        f"{int(count[column])} router scores of expert {column} in MoE layer {index} (counted from 0) are NaN: "
        "they have no order, so there is no k-th largest."
    )


def _target_counts(num_tokens: Tensor, rates: Tensor | float) -> Tensor:
    """Return `target_count` for tensors."""
    return (num_tokens.double() * rates + 0.5).long().clamp_min(1).minimum(num_tokens)


def _ordered_key(values: Tensor) -> Tensor:
    """Return int64 in [0, 2³²) in the same order as the fp32 ``values`` (-0.0 counts as 0.0)."""
    bits = (values + 0.0).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return torch.where(bits >= 1 << 31, 0xFFFFFFFF - bits, bits + (1 << 31))


def _key_to_float(key: Tensor) -> Tensor:
    """Return the values of `_ordered_key`'s results."""
    bits = torch.where(key >= 1 << 31, key - (1 << 31), 0xFFFFFFFF - key)
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
    return signed.to(torch.int32).view(torch.float32)


def _from_top(histogram: Tensor) -> Tensor:
    """Return how many values are in each bin of ``histogram`` or a higher one, int64 [T, B], highest bin first."""
    return histogram.flip(-1).cumsum(-1)


def _digit_histogram(keys: Tensor, prefix: Tensor, used: int, bits: int) -> Tensor:
    """Count the next digit, int32 [C, 2**bits], among the sorted keys [C, N] that begin with ``prefix`` [C]."""
    edges = (prefix.unsqueeze(-1) << bits) + torch.arange((1 << bits) + 1, device=keys.device)
    return torch.searchsorted(keys, edges << (32 - used)).diff(dim=-1).to(torch.int32)


def _sorted_columns(chunk: Tensor) -> Tensor:
    """Return the columns of ``chunk`` [N, C] sorted upwards, [C, N]."""
    by_column = chunk.t().contiguous()
    if chunk.device.type == "cpu":  # numpy's sort is vectorised: 2 against 9 ms for 16 columns of 8192
        return torch.from_numpy(np.sort(by_column.numpy(), axis=-1))
    return by_column.sort(dim=-1).values
