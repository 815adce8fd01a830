"""Checkpoints of a run: when they are written, how they reach the disk, and what is checked before one is loaded."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.checkpoint.api import CheckpointException

from lightning_moe.atomic import atomic_open, sync
from lightning_moe.checkpoints.exported import is_exported
from lightning_moe.checkpoints.read import read_checkpoint
from lightning_moe.errors import CheckpointNotWritten, RunStopped, UserError
from lightning_moe.filenames import LAST_CHECKPOINT, PREVIOUS_CHECKPOINT
from lightning_moe.tracking import MLflowLogger
from lightning_moe.training.signals import EXIT_CODES, StopSignals, leave_sigterm_to_the_system

PENDING = f".{LAST_CHECKPOINT}.pending"
SET_ASIDE = f"{LAST_CHECKPOINT}.set-aside"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file beside its place, then renames it; reads sharded and
    exported ones too.

    Lightning's own goes through the system's temporary folder: on another disk its last step is a copy, and a crash in
    the middle leaves half a checkpoint.

    Raises:
        OSError: the disk is full, or the file cannot be written for another reason of the system's.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            with atomic_open(Path(path)) as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:  # torch closes its file behind a failed write, and that complaint comes last
            reason = error.__cause__ or error.__context__
            if not isinstance(reason, OSError):
                raise
            raise reason from None

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if Path(path).is_dir() or is_exported(Path(path)):
            return read_checkpoint(Path(path))
        content: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        return content


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint for a run: ``checkpoints/last.ckpt`` every so often, at the end, and when a signal
    asks the run to stop. The one before stays as ``checkpoints/previous.ckpt``.

    A checkpoint is written right behind its optimizer step, but takes its name only when everything about that step
    is recorded: its metrics, and the validation that follows it. So whatever kills the run, a checkpoint never knows
    more than the record, and continuing from it leaves no gap there.

    Args:
        every_n_train_steps: optimizer steps between checkpoints; null if ``train_time_interval`` is given.
        train_time_interval: time between checkpoints instead, for example ``00:30:00``.
        keep_all: also keep each one as ``checkpoints/step-000100.ckpt`` (to compare checkpoints of one run later).
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
        super().__init__(
            save_last=True,
            save_top_k=0,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            enable_version_counter=False,
        )
        self.keep_all = keep_all
        self._signals = StopSignals()
        self._stop = 0  # the signal that all ranks know of
        self._seen_step = 0
        self._pending_step: int | None = None

    # --- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        first = trainer.strategy.broadcast(trainer.ckpt_path)
        if trainer.ckpt_path != first:
            raise UserError(
                f"rank {trainer.global_rank} would start from {trainer.ckpt_path or 'scratch'}, rank 0 from "
                f"{first or 'scratch'}: output_dir must be in a file system that all machines share"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._signals.install()
        self._stop, self._seen_step, self._pending_step = 0, trainer.global_step, None
        if (self._folder / LAST_CHECKPOINT).exists():
            self.last_model_path = str(self._folder / LAST_CHECKPOINT)
        if trainer.is_global_zero:
            _remove(self._folder / PENDING)
            self._set_aside_a_later_one(trainer)
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
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._stop:
            self._save(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A validation may be long, and a pre-empted run has seconds: it is left, and done again when continued."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._stop = self._stop or self._signals.agreed()
        if self._stop:
            self._last_global_step_saved = -1  # the pending one would skip the validation
            self._save(trainer)
            self._publish(trainer)
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step is always kept, also where the interval does not divide the number of steps."""
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
        if trainer.is_global_zero and self.dirpath:
            _remove(self._folder / PENDING)

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
    def _folder(self) -> Path:
        return Path(str(self.dirpath))

    def _how_to_continue(self) -> str:
        return f"--ckpt_path last --run_name {self._folder.parent.name}"

    def _save(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        problem = None
        try:
            trainer.save_checkpoint(self._folder / PENDING, self.save_weights_only)
        except OSError as error:
            problem = str(error)
            trainer.strategy.barrier()  # the other ranks wait there for this one, which alone writes
        except CheckpointException as error:  # of all ranks together
            problem = "; ".join(sorted({_reason(cause[0]) for cause in error.failures.values()}))
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise CheckpointNotWritten(self._not_written(trainer.global_step, problem))
        self._last_global_step_saved = self._pending_step = trainer.global_step
        self._last_checkpoint_saved = filepath

    def _not_written(self, step: int, problem: str) -> str:
        last = self._folder / LAST_CHECKPOINT
        kept = f"{last} is whole and stays" if last.exists() else "there is no earlier one"
        free = shutil.disk_usage(self._folder).free / 2**20
        return (
            f"the checkpoint of step {step} cannot be written to {self._folder}: {problem} ({free:.0f} MiB free); "
            f"{kept}. Make room, then continue with {self._how_to_continue()}"
        )

    def _publish(self, trainer: Trainer) -> None:
        """Give the pending checkpoint its name."""
        step, self._pending_step = self._pending_step, None
        if step is None or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, MLflowLogger):
                logger.flush()
        pending, last = self._folder / PENDING, self._folder / LAST_CHECKPOINT
        if pending.is_dir():
            for path in (*pending.iterdir(), pending):
                sync(path)
        if last.exists():
            _keep(last, self._folder / PREVIOUS_CHECKPOINT, stays=last.is_file() and pending.is_file())
        os.replace(pending, last)
        if self.keep_all:
            _link(last, self._folder / f"step-{step:06d}.ckpt")
        sync(self._folder)

    def _set_aside_a_later_one(self, trainer: Trainer) -> None:
        """Training goes on from an older checkpoint of this run: its damaged or abandoned last one is no longer that,
        and must not become the previous one."""
        start, last = Path(str(trainer.ckpt_path)), self._folder / LAST_CHECKPOINT
        inside = trainer.ckpt_path is not None and start.parent.resolve() == self._folder.resolve()
        if inside and start.name != LAST_CHECKPOINT and last.exists():
            _remove(self._folder / SET_ASIDE)
            os.replace(last, self._folder / SET_ASIDE)

    # --- state

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """In a validation: say that its first batch is the next thing to do (Lightning's counters of a batch begun)."""
        if trainer.validating and trainer.state.fn == TrainerFn.FITTING:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what Lightning keeps here are paths, which mean nothing in a moved run's folder."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def _reason(error: BaseException) -> str:
    """Why a shard was not written. torch's file complains of its own position behind a failed write, and what the
    system said of it does not travel between processes."""
    lost = isinstance(error, RuntimeError)
    return "a shard cannot be written in full: no room, a quota, or a limit of file sizes" if lost else str(error)


def _keep(path: Path, name: Path, stays: bool) -> None:
    """Let ``name`` be what ``path`` is now. ``stays``: both exist at every moment; a folder cannot be replaced so."""
    if stays:
        _link(path, name)
    else:
        _remove(name)
        os.replace(path, name)


def _link(path: Path, name: Path) -> None:
    temporary = name.with_name(f".{name.name}.tmp")
    _remove(temporary)
    try:
        if path.is_dir():
            shutil.copytree(path, temporary, copy_function=os.link)
        else:
            os.link(path, temporary)
    except OSError:  # a file system without hard links
        _remove(temporary)
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, temporary)
    if temporary.is_dir() or name.is_dir():
        _remove(name)
    os.replace(temporary, name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            path.unlink()
