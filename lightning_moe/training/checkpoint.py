"""The callback that writes a run's checkpoints."""

from __future__ import annotations

import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.checkpoint.api import CheckpointException

from lightning_moe.atomic import remove_leftovers
from lightning_moe.errors import CheckpointNotWritten, RunStopped, UserError
from lightning_moe.filenames import CHECKPOINT_FOLDER, LAST_CHECKPOINT
from lightning_moe.internals.lightning import begin_with_validation
from lightning_moe.tracking import MLflowLogger
from lightning_moe.training.checkpoint_files import PENDING, publish, remove, set_aside_a_later_one
from lightning_moe.training.signals import EXIT_CODES, StopSignals, leave_sigterm_to_the_system


class RunCheckpoint(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` at intervals, at the end, and when a signal asks the run to stop.

    The one before stays as ``checkpoints/previous.ckpt``. A checkpoint is written right after its optimizer step, but
    takes its name only when the metrics of that step and the validation that follows it are recorded. So whatever kills
    the run, a checkpoint is never ahead of the record, and continuing from it leaves no gap there.

    Args:
        every_n_train_steps: optimizer steps between checkpoints, 0 for none before the end; null if
            ``train_time_interval`` is given.
        train_time_interval: time between checkpoints instead, for example ``00:30:00``.
        keep_all: whether to keep each one as ``checkpoints/step-000100.ckpt`` too.

    Attributes:
        last_model_path: path of the last checkpoint that has its name; empty before the first.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = 100,
        train_time_interval: timedelta | None = None,
        keep_all: bool = False,
    ) -> None:
        if (every_n_train_steps is None) == (train_time_interval is None):
            raise UserError(
                f"checkpoint.every_n_train_steps={every_n_train_steps} and checkpoint.train_time_interval="
                f"{train_time_interval}: give one, and null for the other."
            )
        if every_n_train_steps is not None and every_n_train_steps < 0:
            raise UserError(f"checkpoint.every_n_train_steps={every_n_train_steps}: must be at least 0")
        self.every_n_train_steps, self.train_time_interval = every_n_train_steps, train_time_interval
        self.keep_all, self.last_model_path = keep_all, ""
        self._folder: Path | None = None
        self._signals = StopSignals()
        self._stop = 0  # the signal that all ranks know of
        self._seen_step = self._saved_step = 0
        self._pending_step: int | None = None
        self._interval_began = 0.0

    # --- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = Path(trainer.default_root_dir).absolute() / CHECKPOINT_FOLDER
        self._folder = Path(trainer.strategy.broadcast(str(folder)))
        first = trainer.strategy.broadcast(trainer.ckpt_path)
        if trainer.ckpt_path != first:
            raise UserError(
                f"rank {trainer.global_rank} would start from {trainer.ckpt_path or 'scratch'}, rank 0 from "
                f"{first or 'scratch'}: output_dir must be in a file system that all machines share"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.install()
        self._stop, self._seen_step, self._pending_step = 0, trainer.global_step, None
        self._interval_began = time.monotonic()
        if self._last.exists():
            self.last_model_path = str(self._last)
        if trainer.is_global_zero:
            remove(self._pending)
            for folder in (self._last.parent, self._last.parent.parent):  # this process alone writes the run now
                remove_leftovers(folder, other_machines=True)
            set_aside_a_later_one(self._last.parent, Path(trainer.ckpt_path) if trainer.ckpt_path else None)
        trainer.strategy.barrier()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._publish(trainer)
        self._stop_if_asked(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen_step:  # between two micro-batches of a step
            return
        self._seen_step = trainer.global_step
        self._stop = self._signals.agreed()
        if self._is_due(trainer) or self._stop:
            self._save(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop in a validation too, because a pre-empted run has seconds. The validation is repeated on resuming."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._stop = self._stop or self._signals.agreed()
        if self._stop:
            self._saved_step = -1  # the pending one would skip the validation
            self._save(trainer)
            self._publish(trainer)
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the last step, even if the interval does not divide the number of steps."""
        self._save(trainer)
        self._publish(trainer)
        trainer.strategy.barrier()
        self._signals.restore()
        self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            leave_sigterm_to_the_system()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._signals.restore()
        if trainer.is_global_zero and self._folder is not None:
            remove(self._pending)

    def _is_due(self, trainer: Trainer) -> bool:
        """Return whether an interval ends with this step, by the clock of rank 0. Collective."""
        if self.train_time_interval is None:
            return bool(self.every_n_train_steps and trainer.global_step % self.every_n_train_steps == 0)
        now = time.monotonic()
        passed = now - self._interval_began >= self.train_time_interval.total_seconds()
        due: bool = trainer.strategy.broadcast(passed)
        if due:
            self._interval_began = now
        return due

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if self._stop:
            cause = signal.Signals(self._stop)
            raise RunStopped(
                f"stopped by {'Ctrl-C' if cause == signal.SIGINT else cause.name} after {trainer.global_step} steps; "
                f"the checkpoint is {self.last_model_path}. Continue with {self._how_to_continue()}",
                EXIT_CODES[cause],
            )

    # --- how

    @property
    def _last(self) -> Path:
        assert self._folder is not None
        return self._folder / LAST_CHECKPOINT

    @property
    def _pending(self) -> Path:
        return self._last.with_name(PENDING)

    def _how_to_continue(self) -> str:
        return f"--ckpt_path last --run_name {self._last.parent.parent.name}"

    def _save(self, trainer: Trainer) -> None:
        """Write the pending checkpoint of this step, unless it is written already. Collective."""
        if not trainer.fast_dev_run and trainer.global_step != self._saved_step:  # type: ignore[attr-defined]
            self._write(trainer)
            self._saved_step = self._pending_step = trainer.global_step

    def _write(self, trainer: Trainer) -> None:
        problem = None
        try:
            trainer.save_checkpoint(self._pending, weights_only=False)
        except OSError as error:
            problem = str(error)
            trainer.strategy.barrier()  # the other ranks wait there for this one, which writes
        except CheckpointException as error:  # of all ranks together
            problem = "; ".join(sorted({_reason(cause[0]) for cause in error.failures.values()}))
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise CheckpointNotWritten(self._not_written(trainer.global_step, problem))

    def _not_written(self, step: int, problem: str) -> str:
        kept = f"{self._last} is whole and stays" if self._last.exists() else "there is no earlier one"
        free = shutil.disk_usage(self._last.parent).free / 2**20
        return (
            f"the checkpoint of step {step} cannot be written to {self._last.parent}: {problem} ({free:.0f} MiB free); "
            f"{kept}. Make room, then continue with {self._how_to_continue()}"
        )

    def _publish(self, trainer: Trainer) -> None:
        """Give the pending checkpoint its name, after the record of its step has reached the disk."""
        step, self._pending_step = self._pending_step, None
        if step is None:
            return
        self.last_model_path = str(self._last)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, MLflowLogger):
                    logger.flush()
            publish(self._last.parent, step, self.keep_all)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.validating and trainer.state.fn == TrainerFn.FITTING:
            begin_with_validation(checkpoint)


def _reason(error: BaseException) -> str:
    """Return why a shard was not written.

    After a failed write torch's file complains about its own position, and the system's error does not travel between
    processes.
    """
    lost = isinstance(error, RuntimeError)
    return "a shard cannot be written in full: no room, a quota, or a limit of file sizes" if lost else str(error)
