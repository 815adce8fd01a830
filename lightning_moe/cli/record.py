"""The callbacks by which the command line follows a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lightning_moe.data import TextDataModule
from lightning_moe.tracking import MLflowLogger


class RecordRun(Callback):
    """Opens the run's record once model and data stand, so that a mistake in the configuration leaves no trace.

    Args:
        tracking: becomes the trainer's logger.
        folder: the run's folder.
        config: the complete configuration, for ``config.yaml``: ``fit --config <run>/config.yaml`` repeats the run.
        tags: by which runs are told apart; the data's fingerprint is added.
    """

    def __init__(self, tracking: MLflowLogger, folder: Path, config: str, tags: dict[str, str]) -> None:
        self.tracking, self.folder, self.config, self.tags = tracking, folder, config, tags

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self.tracking in trainer.loggers:
            return
        self.tracking.bind(self.folder)
        trainer.loggers = [self.tracking, *trainer.loggers]
        self._announce(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Metrics are logged under the optimizer steps done. Lightning counts these once more when it continues from a
        checkpoint that was written at the end of training, right behind a validation."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    @rank_zero_only
    def _announce(self, trainer: Trainer) -> None:
        self.tracking.log_config(self.config)
        data = getattr(trainer, "datamodule", None)
        fingerprint = {"data_fingerprint": data.fingerprint} if isinstance(data, TextDataModule) else {}
        self.tracking.log_tags(self.tags | fingerprint)
        print(f"Run folder: {self.folder}")


class LastValidation(Callback):
    """Remembers the optimizer step of the last validation."""

    step: int | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
