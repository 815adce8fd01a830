"""The callbacks by which the command line follows a run."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lightning_moe.checkpoints.read import read_header
from lightning_moe.data import TextDataModule
from lightning_moe.errors import UserError
from lightning_moe.filenames import EVALUATIONS_FOLDER
from lightning_moe.runs.loading import check_tokenizer
from lightning_moe.tracking import MLflowLogger
from lightning_moe.tracking.state import read_state


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
        _check_initial_tokenizer(trainer, pl_module)
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
        self.tracking.log_tags(self.tags | _fingerprint(trainer))
        print(f"Run folder: {self.folder}")


class RecordEvaluation(Callback):
    """Records ``validate`` or ``test`` of a checkpoint as a run of its own, in MLflow below the run it came from.

    Not in that run: its curves are those of its training, and an evaluation may have other settings.

    Args:
        tracking: becomes the trainer's logger.
        run_folder: the folder of the run that wrote the checkpoint; the record lies in its ``evaluations/``.
        command: ``validate`` or ``test``; the tag ``kind``.
        config: the complete configuration; its keys become parameters.
        tags: by which runs are told apart.
    """

    def __init__(
        self, tracking: MLflowLogger, run_folder: Path, command: str, config: str, tags: dict[str, str]
    ) -> None:
        self.tracking, self.config = tracking, config
        name = f"{run_folder.name}-{command}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        self.folder = run_folder / EVALUATIONS_FOLDER / name
        source = read_state(run_folder)
        parent = {} if source is None else {"mlflow.parentRunId": source.run_id}
        self.tags = tags | parent | {"kind": command, "source_run": run_folder.name}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.tracking.bind(self.folder)
        trainer.loggers = [self.tracking]
        if trainer.is_global_zero:
            self.tracking.log_hyperparams(yaml.safe_load(self.config))
            self.tracking.log_tags(self.tags | _fingerprint(trainer))
            print(f"Record: {self.folder}")


def _check_initial_tokenizer(trainer: Trainer, module: LightningModule) -> None:
    """What `LanguageModel.init_from` names was trained with this run's tokenizer, or is refused."""
    path, data = getattr(module, "init_from", None), getattr(trainer, "datamodule", None)
    if path is None or trainer.ckpt_path is not None or not isinstance(data, TextDataModule):
        return
    try:
        check_tokenizer(data.tokenizer, read_header(Path(path)), "--data.tokenizer.file")
    except UserError as error:
        raise UserError(f"model.init_from: {path}: {error}") from error


def _fingerprint(trainer: Trainer) -> dict[str, str]:
    data = getattr(trainer, "datamodule", None)
    return {"data_fingerprint": data.fingerprint} if isinstance(data, TextDataModule) else {}


def log_at_last_step(trainer: Trainer, steps: int) -> None:
    """Have an evaluation behind training logged where one inside of it would be: under the last optimizer step.

    Args:
        trainer: the trainer.
        steps: optimizer steps that the model has seen.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = steps - 1


class LastValidation(Callback):
    """Remembers the optimizer step of the last validation."""

    step: int | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
