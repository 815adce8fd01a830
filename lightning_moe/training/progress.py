"""The progress of a run: a bar in a terminal, a line a minute in a log."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_moe import waits
from lightning_moe.callbacks.clock import LoggingClock

SECONDS_BETWEEN_LINES = 60.0
LOSS = "train/loss"


class StepProgress(TQDMProgressBar):
    """Counts optimizer steps, from those that a resumed run has done to the last one of the run.

    It shows the training loss. On a GPU, where reading a number is a wait, that is the loss of the last logged step.
    A log (anything that is not a terminal) gets a line a minute instead of a bar.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loss: dict[str, float] = {}
        self._clock = LoggingClock()
        self._terminal = sys.stdout.isatty()
        self._total: int | None = None
        self._first = 0
        self._began = self._said = 0.0

    @property
    def is_disabled(self) -> bool:
        """Whether no bar is drawn."""
        return super().is_disabled or not self._terminal

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.unit = " steps"
        return bar

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        steps = trainer.estimated_stepping_batches
        self._total = None if math.isinf(steps) else int(steps)
        self._first = trainer.global_step
        self._clock.start(trainer)
        self._began = self._said = time.monotonic()
        super().on_train_start()
        bar = self.train_progress_bar
        bar.total, bar.initial = self._total, self._first
        bar.n = bar.last_print_n = self._first
        bar.set_description("Training")

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Keep the bar, which counts the whole run."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {**self._loss, **super().get_metrics(trainer, pl_module)}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        steps, bar = trainer.global_step, self.train_progress_bar
        loss, is_logged = trainer.callback_metrics.get(LOSS), self._clock.is_due(trainer)
        if loss is not None and (is_logged or not waits.reading_waits(loss.device)):
            self._loss = {LOSS: float(loss)}
        if self.is_enabled and not bar.disable and steps > bar.n:
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.update(steps - bar.n)
        elif self.is_enabled and not self._terminal and time.monotonic() > self._said + SECONDS_BETWEEN_LINES:
            self._say(trainer, pl_module)

    def _say(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps, now = trainer.global_step, time.monotonic()
        self._said = now
        metrics = "".join(f", {name} {value:.4f}" for name, value in self.get_metrics(trainer, pl_module).items())
        seconds_per_step = (now - self._began) / max(1, steps - self._first)
        whole = left = ""
        if self._total is not None:
            whole = f" of {self._total}"
            left = f", about {seconds_per_step * (self._total - steps) / 60:.0f} min left"
        print(f"step {steps}{whole}{metrics}{left}", flush=True)
