"""Updates EMA thresholds, and balancing biases, once per optimizer step from the pooled global batch."""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_moe.callbacks.layers import named_moe_layers, sum_over_ranks
from lightning_moe.errors import UserError
from lightning_moe.model.moe import MoELayer
from lightning_moe.routing.base import PooledStatistics
from lightning_moe.routing.normal import gaussian_cutoff
from lightning_moe.routing.pooling import pooled_kth_largest


class RoutingStateUpdate(pl.Callback):
    """Pools the router statistics of all ranks and accumulation steps, then lets each layer's rule update its state.

    Every micro-batch of an optimizer step sees the same state; the update comes after the last one's backward pass.
    The sums of all layers travel in one all-reduce; the exact cutoffs of all layers in four of fixed size
    (`routing.pooling.pooled_kth_largest`), and in none with one process. Works on any LightningModule that contains
    `MoELayer`s.

    Raises:
        UserError: a rule pools tokens over ranks in the forward pass, and ``trainer.accumulate_grad_batches`` is not 1.
    """

    def __init__(self) -> None:
        self._observations: list[dict[str, Observation]] = []  # of each micro-batch since the last optimizer step

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rules = [layer.rule for layer in named_moe_layers(pl_module).values() if layer.rule.pools_over_ranks]
        if rules and trainer.accumulate_grad_batches > 1:
            raise UserError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: {type(rules[0]).__name__} with a "
                "global pool needs 1. A layer's output is needed before the later micro-batches of the step have run, "
                "so their tokens cannot be in the pool. Use more ranks, a smaller data.global_batch_size, or another "
                "pool."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._observations = []

    @torch.no_grad()
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = named_moe_layers(pl_module)
        self._observations.append({name: observe(layer) for name, layer in layers.items() if layer.record is not None})

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        observations, self._observations = self._observations, []
        observed = observations[0] if observations else {}
        layers = {name: layer for name, layer in named_moe_layers(pl_module).items() if name in observed}
        if not layers:
            return
        statistics = pool_statistics(layers, observations)
        for name, layer in layers.items():
            layer.rule.update(layer.state, statistics[name])


@dataclass(frozen=True)
class Observation:
    """One layer's part of the statistics, from one micro-batch.

    Args:
        sums: fp64 [R, E], what is summed over the global batch: the number of tokens, the load and, for Gaussian
            cutoffs, the scores and their squares. Counts are exact in fp64.
        scores: fp32 [n, E], the pooled scores; null unless the exact k-th largest is wanted.
    """

    sums: Tensor
    scores: Tensor | None


def observe(layer: MoELayer) -> Observation:
    """What the layer's last forward pass adds to the statistics."""
    assert layer.record is not None
    logits, mask = layer.record.logits, layer.record.selection.mask.flatten(0, 1)
    load = mask.sum(0).double()
    sums = [torch.full_like(load, mask.shape[0]), load]
    estimator = layer.rule.cutoff_estimator
    if estimator is None:
        return Observation(torch.stack(sums), None)
    scores = layer.rule.pool_scores(logits, layer.state).flatten(0, 1)
    if estimator == "gaussian":
        return Observation(torch.stack([*sums, scores.double().sum(0), scores.double().square().sum(0)]), None)
    return Observation(torch.stack(sums), scores)


def pool_statistics(
    layers: dict[str, MoELayer], observations: list[dict[str, Observation]]
) -> dict[str, PooledStatistics]:
    """Statistics of the global batch from this rank's micro-batches.

    Args:
        layers: the MoE layers by name.
        observations: of each micro-batch, what each layer observed.
    """
    local = {name: torch.stack([of_batch[name].sums for of_batch in observations]).sum(0) for name in layers}
    flat = sum_over_ranks(torch.cat([sums.flatten() for sums in local.values()]))
    parts = torch.split(flat, [sums.numel() for sums in local.values()])
    sums = {name: part.view_as(local[name]) for name, part in zip(layers, parts, strict=True)}

    cutoffs: dict[str, Tensor] = {}  # [1 + R, E]: for the target rate, then for the rates of the sketch
    rates = {name: (layer.state.rate, *layer.rule.sketch_rates(layer.state.rate)) for name, layer in layers.items()}
    exact: dict[str, Tensor] = {}  # the pooled scores [N_local, E]
    for name, layer in layers.items():
        if layer.rule.cutoff_estimator == "gaussian":
            num_tokens, _, total, total_squares = sums[name]
            cutoffs[name] = torch.stack(
                [gaussian_cutoff(num_tokens, total, total_squares, rate) for rate in rates[name]]
            )
        elif layer.rule.cutoff_estimator is not None:
            scores = [of_batch[name].scores for of_batch in observations]
            exact[name] = torch.cat([part for part in scores if part is not None])
    if exact:
        wanted = [rates[name] for name in exact]
        offsets = [int(layers[name].rule.cutoff_estimator == "next_largest") for name in exact]
        cutoffs |= zip(exact, pooled_kth_largest(list(exact.values()), wanted, offsets=offsets), strict=True)
    return {
        name: PooledStatistics(
            of_layer[0, 0].long(),
            of_layer[1].long(),
            cutoffs[name][0] if name in cutoffs else None,
            cutoffs[name][1:] if len(rates[name]) > 1 and name in cutoffs else None,
        )
        for name, of_layer in sums.items()
    }
