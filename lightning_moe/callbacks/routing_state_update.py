"""Updates EMA thresholds, and balancing biases, once per optimizer step from the pooled global batch."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_moe.callbacks.layers import named_moe_layers, sum_over_ranks
from lightning_moe.model.moe import MoELayer
from lightning_moe.routing.base import PooledStatistics
from lightning_moe.routing.pooling import pooled_kth_largest


class RoutingStateUpdate(pl.Callback):
    """Pools the router statistics of all ranks and accumulation steps, then lets each layer's rule update its state.

    Every micro-batch of an optimizer step sees the same state; the update comes after the last one's backward pass.
    The counts of all layers travel in one all-reduce; the cutoffs of all layers in three of fixed size
    (`routing.pooling.pooled_kth_largest`), and in none with one process. Works on any LightningModule that contains
    `MoELayer`s.
    """

    def __init__(self) -> None:
        self._records: list[dict[str, tuple[Tensor, Tensor | None]]] = []  # per micro-batch: load [E], scores [n, E]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._records = []

    @torch.no_grad()
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = named_moe_layers(pl_module)
        self._records.append({name: _observe(layer) for name, layer in layers.items() if layer.record is not None})

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        records, self._records = self._records, []
        layers = {name: layer for name, layer in named_moe_layers(pl_module).items() if records and name in records[0]}
        if not layers:
            return
        statistics = pool_statistics(layers, records)
        for name, layer in layers.items():
            layer.rule.update(layer.state, statistics[name])


def _observe(layer: MoELayer) -> tuple[Tensor, Tensor | None]:
    """This micro-batch's load int64 [E], and the scores [n, E] if the rule wants their pooled k-th largest."""
    assert layer.record is not None
    logits, mask = layer.record.logits, layer.record.selection.mask
    load = mask.sum((0, 1))
    scores = layer.rule.pool_scores(logits, layer.state).flatten(0, 1) if layer.rule.pools_cutoff else None
    return load, scores


def pool_statistics(
    layers: dict[str, MoELayer], records: list[dict[str, tuple[Tensor, Tensor | None]]]
) -> dict[str, PooledStatistics]:
    """Statistics of the global batch from this rank's micro-batches.

    Args:
        layers: the MoE layers by name.
        records: for each micro-batch and layer the load int64 [E] and the scores fp32 [n, E] or null.
    """
    names = list(layers)
    num_experts = [layers[name].state.num_experts for name in names]
    loads = torch.cat([torch.stack([record[name][0] for record in records]).sum(0) for name in names])
    first = layers[names[0]].record
    assert first is not None
    tokens = len(records) * first.logits[..., 0].numel()
    counts = sum_over_ranks(torch.cat([loads, loads.new_tensor([tokens])]))
    num_tokens = counts[-1]
    statistics = {
        name: PooledStatistics(num_tokens, load)
        for name, load in zip(names, torch.split(counts[:-1], num_experts), strict=True)
    }
    pooled = [name for name in names if layers[name].rule.pools_cutoff]
    if pooled:
        scores = [torch.cat([_scores(record[name]) for record in records]) for name in pooled]
        rates = [layers[name].state.rate for name in pooled]
        for name, cutoff in zip(pooled, pooled_kth_largest(scores, rates), strict=True):
            statistics[name] = PooledStatistics(num_tokens, statistics[name].load, cutoff)
    return statistics


def _scores(observation: tuple[Tensor, Tensor | None]) -> Tensor:
    assert observation[1] is not None
    return observation[1]
