"""Stops a run whose loss is no longer a number, before a checkpoint of it is written."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_moe.callbacks.clock import log_interval
from lightning_moe.callbacks.layers import named_moe_layers, sum_over_ranks
from lightning_moe.errors import TrainingDiverged


class FiniteGuard(pl.Callback):
    """Raises `TrainingDiverged` with the first bad step and the lowest layer whose router logits were not finite then.

    On a CPU each step is looked at before the optimizer moves. On an accelerator the flags stay on the device and
    are read every ``trainer.log_every_n_steps`` steps and before every checkpoint, so the step itself does not wait
    for them.
    """

    def __init__(self) -> None:
        self._flags: list[tuple[int, Tensor]] = []  # (step, bool [1 + layers]: loss bad, each layer's logits bad)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        records = [layer.record for layer in named_moe_layers(pl_module).values()]
        bad = [~loss.detach().isfinite().all()]
        bad += [~record.logits.isfinite().all() for record in records if record is not None]
        self._flags.append((trainer.global_step, torch.stack(bad)))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if pl_module.device.type == "cpu" or (trainer.global_step + 1) % log_interval(trainer) == 0:
            self._look(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look(trainer, pl_module)

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
            where = f"the router logits of {layer} first" if layer else "not in the router logits, but behind them"
            last = getattr(trainer.checkpoint_callback, "last_model_path", "") or None
            kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written"
            raise TrainingDiverged(
                f"The loss is not finite at step {step}: {where}. Training stops; {kept}. "
                "A lower learning rate or a longer warm-up usually helps."
            )
