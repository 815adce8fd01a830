"""Router statistics of the global batch: the part of each micro-batch, and the sum over micro-batches and ranks.

Shape letters: B sequences, S tokens, E experts, n tokens of a micro-batch, R rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.ranks import sum_over_ranks
from lightning_moe.routing.base import PooledStatistics, RoutingRecord, RoutingState
from lightning_moe.routing.normal import gaussian_cutoff
from lightning_moe.routing.pooling import pooled_kth_largest


@dataclass(frozen=True)
class MicroBatchStatistics:
    """One layer's part of the statistics, from one micro-batch.

    Args:
        sums: sums over the tokens, fp64 [2 or 4, E]: their number, the load and, for Gaussian cutoffs, the scores and
            their squares. Counts are exact in fp64.
        scores: pooled scores, fp32 [n, E]; `None` unless the exact k-th largest is wanted.
    """

    sums: Tensor
    scores: Tensor | None


def micro_batch_statistics(record: RoutingRecord, state: RoutingState) -> MicroBatchStatistics:
    """Compute what a layer's last forward pass adds to the statistics.

    Args:
        record: record of that pass.
        state: state of the layer; its rule says which statistics it needs.
    """
    mask = record.selection.mask.flatten(0, 1)
    load = mask.sum(0).double()
    sums = [torch.full_like(load, mask.shape[0]), load]
    estimator = state.rule.cutoff_estimator
    if estimator is None:
        return MicroBatchStatistics(torch.stack(sums), None)
    scores = state.rule.pool_scores(record.logits, state).flatten(0, 1)
    if estimator == "gaussian":
        squares = scores.double().square().sum(0)
        return MicroBatchStatistics(torch.stack([*sums, scores.double().sum(0), squares]), None)
    return MicroBatchStatistics(torch.stack(sums), scores)


def pool_statistics(
    states: Mapping[str, RoutingState], parts: Sequence[Mapping[str, MicroBatchStatistics]]
) -> dict[str, PooledStatistics]:
    """Pool the statistics of the global batch from this rank's micro-batches. Collective.

    The sums of all layers travel in one all-reduce, the exact cutoffs of all layers in four of fixed size
    (`routing.pooling.pooled_kth_largest`), and in none with one process.

    Args:
        states: state of each layer, by the layer's name.
        parts: part of each layer, for each micro-batch.

    Returns:
        The statistics of each layer of ``states``.
    """
    # all layers in one tensor: on a GPU the launches of small kernels cost more than the kernels
    local = torch.stack([torch.cat([part[name].sums.flatten() for name in states]) for part in parts])
    flat = sum_over_ranks(local.sum(0))
    shapes = {name: parts[0][name].sums.shape for name in states}
    sums, counts = _of_layers(flat, shapes), _of_layers(flat.long(), shapes)

    cutoffs: dict[str, Tensor] = {}  # [1 + R, E]: for the target rate, then for the rates of the sketch
    rates = {name: (state.rate, *state.rule.sketch_rates(state.rate)) for name, state in states.items()}
    exact: dict[str, Tensor] = {}  # the pooled scores [N_local, E]
    for name, state in states.items():
        if state.rule.cutoff_estimator == "gaussian":
            num_tokens, _, total, total_squares = sums[name]
            cutoffs[name] = torch.stack(
                [gaussian_cutoff(num_tokens, total, total_squares, rate) for rate in rates[name]]
            )
        elif state.rule.cutoff_estimator is not None:
            scores = [part[name].scores for part in parts]
            exact[name] = torch.cat([chunk for chunk in scores if chunk is not None])
    if exact:
        wanted = [rates[name] for name in exact]
        offsets = [int(states[name].rule.cutoff_estimator == "next_largest") for name in exact]
        cutoffs |= zip(exact, pooled_kth_largest(list(exact.values()), wanted, offsets=offsets), strict=True)
    return {
        name: PooledStatistics(
            of_layer[0, 0],
            of_layer[1],
            cutoffs[name][0] if name in cutoffs else None,
            cutoffs[name][1:] if len(rates[name]) > 1 and name in cutoffs else None,
        )
        for name, of_layer in counts.items()
    }


def _of_layers(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Return the part of each layer in its shape."""
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}
