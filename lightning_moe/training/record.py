"""The callbacks that record a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lightning_moe.atomic import atomic_open
from lightning_moe.config.settings import Segment
from lightning_moe.data import TextDataModule
from lightning_moe.errors import UserError
from lightning_moe.filenames import EVALUATIONS_FOLDER, SEGMENTS_FILE, TOKENIZER_FILE
from lightning_moe.internals.lightning import set_logged_step
from lightning_moe.module import LanguageModel
from lightning_moe.runs.loading import check_tokenizer
from lightning_moe.tracking import MLflowLogger, read_metrics
from lightning_moe.tracking.state import read_state
from lightning_moe.training import continuing
from lightning_moe.training.continuing import Trained


class RecordRun(Callback):
    """Opens the run's record when training starts, after all that can refuse it, so that a refusal leaves no trace.

    Args:
        tracking: logger for the trainer.
        folder: folder of the run.
        config: complete configuration, for ``config.yaml``: ``fit --config <run>/config.yaml`` repeats the run.
        tags: tags of the run; the data's fingerprint is added.
        trained: how the checkpoint was trained that the run starts from; `None` without one.
        initial: checkpoint of `LanguageModel.init_from` without its weights; `None` without one.

    Attributes:
        segments: parts of the run that had other settings than the part before; known when training has started.
    """

    def __init__(
        self,
        tracking: MLflowLogger,
        folder: Path,
        config: str,
        tags: dict[str, str],
        trained: Trained | None = None,
        initial: dict[str, Any] | None = None,
    ) -> None:
        self.tracking, self.folder, self.config, self.tags = tracking, folder, config, tags
        self.trained, self.initial = trained, initial
        self.segments: tuple[Segment, ...] = ()
        self._layout: dict[str, int] = {}
        self._compiled: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self.tracking in trainer.loggers:
            return
        if self.initial is not None:
            _check_initial_tokenizer(trainer, pl_module, self.initial)
        self.tracking.bind(self.folder)
        trainer.loggers = [self.tracking, *trainer.loggers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._layout = {"world_size": trainer.world_size, "micro_batch_size": data.micro_batch_size}
        self.segments = continuing.segments(self.trained, self.config, self._layout)
        self._open(trainer)

    @rank_zero_only
    def _open(self, trainer: Trainer) -> None:
        self.tracking.log_config(self.config)
        self.tracking.log_tags(self.tags | _fingerprint(trainer))
        print(f"Run folder: {self.folder}")
        trainer.datamodule.tokenizer.save(self.folder / TOKENIZER_FILE)  # type: ignore[attr-defined]
        self.tracking.log_artifact(self.folder / TOKENIZER_FILE)
        path = self.folder / SEGMENTS_FILE
        if not self.segments:
            path.unlink(missing_ok=True)  # of a later checkpoint than the one that this run goes on from
            return
        with atomic_open(path) as file:
            file.write((json.dumps([asdict(segment) for segment in self.segments], indent=2) + "\n").encode())
        self.tracking.log_artifact(path)
        if self.segments[-1].step == trainer.global_step:
            print(continuing.sentence(self.segments[-1]))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[continuing.RECORD] = continuing.to_checkpoint(self.config, self._layout, self.segments)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the step of logged metrics to the optimizer steps done.

        Lightning counts these twice when it continues from a checkpoint of the end of training, after a validation.
        """
        set_logged_step(trainer, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Record whether the blocks are compiled, once it is known: a compiler may fail in the first step."""
        assert isinstance(pl_module, LanguageModel)
        compiled = str(pl_module.decoder.compiled).lower()
        if compiled != self._compiled and trainer.is_global_zero:
            self._compiled = compiled
            self.tracking.log_tags({"compiled": compiled})


class RecordEvaluation(Callback):
    """Records ``validate`` or ``test`` of a checkpoint as a run of its own.

    That run itself has the curves of its training, and an evaluation may have other settings. MLflow has the record in
    an experiment of its own, so that the table of runs has only runs.

    Args:
        tracking: logger for the trainer.
        run_folder: folder of the run that wrote the checkpoint; the record is in its ``evaluations/``.
        command: command ``validate`` or ``test``, for the tag ``kind``.
        config: complete configuration, whose keys become parameters.
        tags: tags of the run.
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
        self.tracking.bind(self.folder, beside="evaluations")
        trainer.loggers = [self.tracking]

    @rank_zero_only
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the record, after all that can refuse the evaluation."""
        self.tracking.log_hyperparams(yaml.safe_load(self.config))
        self.tracking.log_tags(self.tags | _fingerprint(trainer))
        print(f"Record: {self.folder}")

    on_test_start = on_validation_start


def _check_initial_tokenizer(trainer: Trainer, module: LightningModule, initial: dict[str, Any]) -> None:
    """Refuse weights that were trained with another tokenizer than this run's."""
    try:
        check_tokenizer(trainer.datamodule.tokenizer, initial, "--data.tokenizer.file=<its run>/tokenizer.json")  # type: ignore[attr-defined]
    except UserError as error:
        raise UserError(f"model.init_from: {module.init_from}: {error}") from error


def _fingerprint(trainer: Trainer) -> dict[str, str]:
    data = getattr(trainer, "datamodule", None)
    return {"data_fingerprint": data.fingerprint} if isinstance(data, TextDataModule) else {}


def log_at_last_step(trainer: Trainer, steps: int) -> None:
    """Let an evaluation after training be logged like one in it: under the last optimizer step.

    Args:
        trainer: trainer of the evaluation.
        steps: number of optimizer steps that the model has seen.
    """
    set_logged_step(trainer, steps - 1)


class LastValidation(Callback):
    """Remembers the optimizer step of the last validation."""

    step: int | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step


def has_validation_of(steps: int, folder: Path) -> bool:
    """Return whether the record of a run has the validation after so many optimizer steps."""
    return any(line["step"] >= steps - 1 and "val/loss" in line for line in read_metrics(folder))
