"""Checkpoints of a run: when they are written, how they reach the disk, and what is checked before one is loaded."""

from __future__ import annotations

import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_moe.atomic import atomic_open
from lightning_moe.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file beside its place, then renames it.

    Lightning's own goes through the system's temporary folder: on another disk its last step is a copy, and a crash in
    the middle leaves half a checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_open(Path(path)) as file:
            torch.save(checkpoint, file)


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint for a run: ``checkpoints/last.ckpt`` every so often and at the end.

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
            filename="step-{step:06d}",
            auto_insert_metric_name=False,
            save_last=True,
            save_top_k=-1 if keep_all else 0,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            enable_version_counter=False,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step is always kept, also where the interval does not divide the number of steps."""
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the paths of the same run; those of a moved or another run's folder mean nothing here."""
        if state_dict.get("dirpath") == self.dirpath:
            super().load_state_dict(state_dict)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU, without running any code in it (``weights_only``).

    Raises:
        UserError: the file is missing, truncated, or no checkpoint.
    """
    if not path.exists():
        raise UserError(f"ckpt_path={str(path)!r}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"ckpt_path={str(path)!r}: not a complete checkpoint (truncated or damaged): "
            f"{reason[0][:200] if reason else type(error).__name__}"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"ckpt_path={str(path)!r}: not a checkpoint of this program (it has no 'state_dict')")
    return checkpoint
