"""Exact top-k inside a pool, and the exact k-th largest of a pool that is spread over ranks and micro-batches.

Among equal scores the earlier token of the pool wins, so that exactly k tokens are chosen. A k that is not whole is
rounded half up (`routing.base.target_count`).

Shape letters: N tokens, E experts, C columns of a chunk or of all chunks, K the largest count, R rates of a chunk, B
bins of a histogram, P ranks. A local name that ends in such letters has that shape, after any leading dimensions:
``scores_EN``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe import waits
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
    wanted_E = target_counts(num_tokens_PE.sum(0), rate) - num_above_PE.sum(0) - num_tied_PE[: dist.get_rank()].sum(0)
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
        TrainingDiverged: a chunk holds NaN, which has no order. All ranks raise it, whichever holds the NaN. On a GPU,
            where looking would be a wait in every step, the results of such a column are NaN instead.
    """
    offsets = [0] * len(chunks) if offsets is None else offsets
    # a chunk with fewer rates than another asks for its last one several times
    num_rates = max(len(of_chunk) for of_chunk in rates)
    padded = [[*of_chunk, *[of_chunk[-1]] * (num_rates - len(of_chunk))] for of_chunk in rates]
    if world_size() > 1:
        found = _radix_selection(chunks, padded, offsets)
    elif waits.reading_waits(chunks[0].device):
        found = _positions_of_sorted(chunks, padded, offsets)
    else:
        refuse_nan([chunk.isnan().sum(0) for chunk in chunks])
        found = [
            _order_statistics(chunk, _positions(chunk.shape[0], of_chunk, offset))
            for chunk, of_chunk, offset in zip(chunks, padded, offsets, strict=True)
        ]
    return [values[: len(of_chunk)] for values, of_chunk in zip(found, rates, strict=True)]


def _positions(num_rows: int, rates: Sequence[float], offset: int) -> list[int]:
    """Return the places of the k-th largest of a sorted column, counted from the lowest."""
    return [num_rows - min(target_count(num_rows, rate) + offset, num_rows) for rate in rates]


def _order_statistics(chunk: Tensor, positions: list[int]) -> Tensor:
    """Return the values [R, C] at ``positions`` (0 is the lowest) of each sorted column of ``chunk`` [N, C]."""
    # several positions in one pass: five cost as much as one kthvalue
    partitioned = np.partition(chunk.t().contiguous().numpy(), sorted(set(positions)), axis=-1)
    return torch.from_numpy(partitioned[:, positions].T + 0.0)  # -0.0 counts as 0.0, as in `ordered_key`


def _positions_of_sorted(
    chunks: Sequence[Tensor], rates: Sequence[Sequence[float]], offsets: Sequence[int]
) -> list[Tensor]:
    """Return the values [R, C] of each chunk from one sort of all columns, without a wait. NaN gives NaN."""
    columns, device = [chunk.shape[1] for chunk in chunks], chunks[0].device
    sorted_CN = sorted_columns(torch.cat(list(chunks), dim=1))  # NaN comes last
    places = [
        tuple(_positions(chunk.shape[0], of_chunk, offset))
        for chunk, of_chunk, offset in zip(chunks, rates, offsets, strict=True)
    ]
    places_CR = _constant(tuple(of for of, num in zip(places, columns, strict=True) for _ in range(num)), device)
    found_CR = torch.where(sorted_CN[:, -1:].isnan(), torch.nan, sorted_CN.gather(1, places_CR) + 0.0)
    return [values.t() for values in found_CR.split(columns)]


def _radix_selection(
    chunks: Sequence[Tensor], rates: Sequence[Sequence[float]], offsets: Sequence[int]
) -> list[Tensor]:
    """Return the values [R, C] of each chunk, pooled over all ranks. Collective: four all-reduces of fixed size."""
    columns, device = [chunk.shape[1] for chunk in chunks], chunks[0].device
    all_NC = torch.cat(list(chunks), dim=1)
    keys_CN = ordered_key(sorted_columns(all_NC))
    rates_CR = _constant(tuple(tuple(of) for of, num in zip(rates, columns, strict=True) for _ in range(num)), device)
    offsets_C1 = _constant(tuple((of,) for of, num in zip(offsets, columns, strict=True) for _ in range(num)), device)
    remaining_CR = prefix_CR = torch.zeros_like(rates_CR, dtype=torch.int64)
    nan_C1 = torch.empty(0)
    used = 0
    for bits in _RADIX_BITS:
        used += bits
        bins = 1 << bits
        if used == bits:  # all rates share the first round, which also counts N, k and NaN
            histogram_CB = digit_histogram(keys_CN, prefix_CR[:, :1], used, bits).squeeze(1)
            histogram_CB = torch.cat([histogram_CB, all_NC.isnan().sum(0, dtype=torch.int32).unsqueeze(-1)], dim=1)
            dist.all_reduce(histogram_CB)
            nan_C1 = histogram_CB[:, -1:]
            if not waits.reading_waits(device):
                refuse_nan(nan_C1.squeeze(-1).split(columns))
            from_top_CRB = from_top(histogram_CB[:, :-1]).unsqueeze(1).expand(-1, rates_CR.shape[1], -1)
            num_tokens_CR = from_top_CRB[..., -1]
            remaining_CR = (target_counts(num_tokens_CR, rates_CR) + offsets_C1).minimum(num_tokens_CR)
        else:
            histogram_CRB = digit_histogram(keys_CN, prefix_CR, used, bits)
            dist.all_reduce(histogram_CRB)
            from_top_CRB = from_top(histogram_CRB)
        position_CR = (from_top_CRB < remaining_CR.unsqueeze(-1)).sum(-1)  # bins passed before the k-th is reached
        passed_CR = from_top_CRB.gather(-1, (position_CR - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
        remaining_CR = remaining_CR - torch.where(position_CR > 0, passed_CR, 0)
        prefix_CR = (prefix_CR << bits) | (bins - 1 - position_CR)
    found_CR = torch.where(nan_C1 > 0, torch.nan, key_to_float(prefix_CR))
    return [values.t() for values in found_CR.split(columns)]


@functools.lru_cache(maxsize=64)
def _constant(rows: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    """Return numbers on a device, fp64 or int64. They travel there once, because the host waits for that."""
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.float64 if isinstance(rows[0][0], float) else torch.int64, device=device)


def refuse_nan(counts: Sequence[Tensor]) -> None:
    """Raise `TrainingDiverged` if any of the NaN ``counts`` [C] of the chunks is not 0."""
    if not torch.stack([count.sum() for count in counts]).any():
        return
    index, count = next((index, count) for index, count in enumerate(counts) if count.any())
    column = int(count.nonzero()[0])
    raise TrainingDiverged(
        f"{int(count[column])} router scores of expert {column} in MoE layer {index} (counted from 0) are NaN: "
        "they have no order, so there is no k-th largest."
    )


def target_counts(num_tokens: Tensor, rates: Tensor | float) -> Tensor:
    """Return `target_count` for tensors."""
    return (num_tokens.double() * rates + 0.5).long().clamp_min(1).minimum(num_tokens)


def ordered_key(values: Tensor) -> Tensor:
    """Return int64 in [0, 2³²) in the same order as the fp32 ``values`` (-0.0 counts as 0.0)."""
    bits = (values + 0.0).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return torch.where(bits >= 1 << 31, 0xFFFFFFFF - bits, bits + (1 << 31))


def key_to_float(key: Tensor) -> Tensor:
    """Return the values of `ordered_key`'s results."""
    bits = torch.where(key >= 1 << 31, key - (1 << 31), 0xFFFFFFFF - key)
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
    return signed.to(torch.int32).view(torch.float32)


def from_top(histogram: Tensor) -> Tensor:
    """Return how many values are in each bin of ``histogram`` or a higher one, int64 [..., B], highest bin first."""
    return histogram.flip(-1).cumsum(-1)


def digit_histogram(keys: Tensor, prefix: Tensor, used: int, bits: int) -> Tensor:
    """Count the next digit, int32 [C, R, 2**bits], among the sorted keys [C, N] that begin with ``prefix`` [C, R]."""
    edges = (prefix.unsqueeze(-1) << bits) + torch.arange((1 << bits) + 1, device=keys.device)
    found = torch.searchsorted(keys, (edges << (32 - used)).flatten(1))
    return found.view(edges.shape).diff(dim=-1).to(torch.int32)


def sorted_columns(chunk: Tensor) -> Tensor:
    """Return the columns of ``chunk`` [N, C] sorted upwards, [C, N]."""
    by_column = chunk.t().contiguous()
    if chunk.device.type == "cpu":  # numpy's sort is vectorised: 2 against 9 ms for 16 columns of 8192
        return torch.from_numpy(np.sort(by_column.numpy(), axis=-1))
    return by_column.sort(dim=-1).values
