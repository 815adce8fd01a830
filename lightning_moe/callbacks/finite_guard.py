"""Stops a run whose loss is no longer a number, before a checkpoint of it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_moe import waits
from lightning_moe.callbacks.clock import log_interval
from lightning_moe.errors import TrainingDiverged
from lightning_moe.model.moe_layers import named_moe_layers
from lightning_moe.ranks import sum_over_ranks


class FiniteGuard(pl.Callback):
    """Raises `TrainingDiverged`, naming the first bad step and the lowest layer whose router logits were not finite.

    Weights can become NaN while the loss is still a number (an overflow in the backward pass), so a checkpoint is
    written only if they are finite too.

    On a CPU each step is checked before the optimizer moves. On an accelerator the flags stay on the device. They are
    read every ``trainer.log_every_n_steps`` steps and before every checkpoint, so the step itself does not wait for
    them.
    """

    def __init__(self) -> None:
        self._flags: list[tuple[int, Tensor]] = []  # (step, bool [1 + layers]: loss bad, each layer's logits bad)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        bad = [~loss.detach().isfinite().all()]
        for layer in named_moe_layers(pl_module).values():
            fine = torch.zeros_like(bad[0])
            bad.append(fine if layer.record is None else ~layer.record.logits.isfinite().all())
        self._flags.append((trainer.global_step, torch.stack(bad)))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not waits.reading_waits(pl_module.device) or (trainer.global_step + 1) % log_interval(trainer) == 0:
            self._look(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look(trainer, pl_module)
        names, parameters = zip(*pl_module.named_parameters(), strict=True)
        bad = torch.stack([~_local(parameter).isfinite().all() for parameter in parameters])
        broken = [name for name, is_bad in zip(names, sum_over_ranks(bad.int()).tolist(), strict=True) if is_bad]
        if broken:
            raise TrainingDiverged(
                f"After {trainer.global_step} steps the weights are not finite: {broken[0]} first. Training stops and "
                f"does not save them; {_last_good(trainer)}. A lower learning rate or a longer warm-up usually helps."
            )

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        flags, self._flags = self._flags, []
        if not flags:
            return
        bad = sum_over_ranks(torch.stack([flag for _, flag in flags]).int()).bool().tolist()  # [steps][1 + layers]
        names = list(named_moe_layers(pl_module))
        for (step, _), row in zip(flags, bad, strict=True):
            if not any(row):
                continue
            layer = next((name for name, is_bad in zip(names, row[1:], strict=False) if is_bad), None)
            where = f"the router logits of {layer} first" if layer else "not in the router logits, but after them"
            raise TrainingDiverged(
                f"The loss is not finite at step {step}: {where}. Training stops; {_last_good(trainer)}. "
                "A lower learning rate or a longer warm-up usually helps."
            )


def _local(parameter: Tensor) -> Tensor:
    """Return this rank's part of a sharded parameter, or the parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _last_good(trainer: pl.Trainer) -> str:
    last = getattr(trainer.checkpoint_callback, "last_model_path", "") or None
    # Lightning's own callback sets the path before it writes, and `RunCheckpoint` may set a checkpoint aside
    return f"the last good checkpoint is {last}" if last and Path(last).exists() else "no checkpoint had been written"
