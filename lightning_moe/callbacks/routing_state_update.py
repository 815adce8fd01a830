"""Updates thresholds and balancing biases once per optimizer step, from the pooled global batch."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from lightning_moe.errors import UserError
from lightning_moe.model.moe_layers import named_moe_layers
from lightning_moe.routing.statistics import MicroBatchStatistics, micro_batch_statistics, pool_statistics


class RoutingStateUpdate(pl.Callback):
    """Pools the router statistics of all ranks and accumulation steps, then lets each layer's rule update its state.

    Every micro-batch of an optimizer step sees the same state. The update comes after the backward pass of the last
    one. `routing.statistics.pool_statistics` says what travels between ranks. The callback works on any LightningModule
    that contains `RoutedLayer` modules.

    Raises:
        UserError: a rule pools tokens over ranks in the forward pass, and ``trainer.accumulate_grad_batches`` is not 1.
    """

    #: what `LanguageModel` looks for in a trainer's callbacks; a callback of your own that does this work declares it
    updates_routing_state = True

    def __init__(self) -> None:
        self._parts: list[dict[str, MicroBatchStatistics]] = []  # of each micro-batch since the last optimizer step

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
        self._parts = []

    @torch.no_grad()
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = named_moe_layers(pl_module).items()
        self._parts.append(
            {
                name: micro_batch_statistics(layer.record, layer.state)
                for name, layer in layers
                if layer.record is not None
            }
        )

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        parts, self._parts = self._parts, []
        layers = named_moe_layers(pl_module).items()
        states = {name: layer.state for name, layer in layers if parts and name in parts[0]}
        if not states:
            return
        for name, statistics in pool_statistics(states, parts).items():
            states[name].update(statistics)
