"""The files of a run's checkpoints: written whole, named, and read."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_moe.atomic import atomic_open, sync
from lightning_moe.checkpoints.exported import is_exported
from lightning_moe.checkpoints.files import HEADER
from lightning_moe.checkpoints.read import read_checkpoint
from lightning_moe.filenames import LAST_CHECKPOINT, PREVIOUS_CHECKPOINT

PENDING = f".{LAST_CHECKPOINT}.pending"
SET_ASIDE = f"{LAST_CHECKPOINT}.set-aside"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file beside its place, then renames it; reads sharded and exported ones too.

    Lightning's own class goes through the system's temporary folder. On another disk its last step is a copy, and a
    crash in the middle leaves half a checkpoint.

    Args:
        path: checkpoint that was read already; `None` for none.
        content: content of that checkpoint, which `load_checkpoint` returns once, so that no checkpoint is read twice.

    Raises:
        OSError: the disk is full, or the system refuses the file for another reason.
    """

    def __init__(self, path: Path | None = None, content: dict[str, Any] | None = None) -> None:
        self._read: tuple[Path, dict[str, Any]] | None = None
        if path is not None and content is not None and not (path / HEADER).is_file():  # of shards it has no more
            self._read = (path, content)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self._read = None
        try:
            with atomic_open(Path(path)) as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:  # torch closes its file after a failed write, and that complaint comes last
            reason = error.__cause__ or error.__context__
            if not isinstance(reason, OSError):
                raise
            raise reason from None

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        read, self._read = self._read, None
        if read is not None and read[0] == Path(path):  # the module copies its state_dict by itself
            return {key: part if key == "state_dict" else _in_memory(part) for key, part in read[1].items()}
        if Path(path).is_dir() or is_exported(Path(path)):
            return read_checkpoint(Path(path))
        content: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        return content


def publish(folder: Path, step: int, keep_all: bool) -> None:
    """Give the pending checkpoint its name ``last.ckpt``; the one before becomes ``previous.ckpt``.

    Args:
        folder: folder of the checkpoints, with a pending one.
        step: optimizer step of the pending one.
        keep_all: whether to keep it as ``step-000100.ckpt`` too.
    """
    pending, last = folder / PENDING, folder / LAST_CHECKPOINT
    if pending.is_dir():
        for path in (*pending.iterdir(), pending):
            sync(path)
    if last.exists():
        previous = folder / PREVIOUS_CHECKPOINT
        if last.is_file() and pending.is_file():
            link(last, previous)  # both exist at every moment
        else:  # a folder cannot be replaced in this way
            remove(previous)
            os.replace(last, previous)
    os.replace(pending, last)
    if keep_all:
        link(last, folder / f"step-{step:06d}.ckpt")
    sync(folder)


def set_aside_a_later_one(folder: Path, start: Path | None) -> None:
    """Move ``last.ckpt`` away if training continues from an older checkpoint of the same run.

    A damaged or abandoned last checkpoint is no longer the last one, and must not become the previous one.

    Args:
        folder: folder of the run's checkpoints.
        start: checkpoint that training continues from; `None` for none.
    """
    last = folder / LAST_CHECKPOINT
    inside = start is not None and start.parent.resolve() == folder.resolve()
    if start is not None and inside and start.name != LAST_CHECKPOINT and last.exists():
        remove(folder / SET_ASIDE)
        os.replace(last, folder / SET_ASIDE)


def link(path: Path, name: Path) -> None:
    """Let ``name`` be what ``path`` is now, without a copy if the file system has hard links."""
    temporary = name.with_name(f".{name.name}.tmp")
    remove(temporary)
    try:
        if path.is_dir():
            shutil.copytree(path, temporary, copy_function=os.link)
        else:
            os.link(path, temporary)
    except OSError:  # a file system without hard links
        remove(temporary)
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, temporary)
    if temporary.is_dir() or name.is_dir():
        remove(name)
    os.replace(temporary, name)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def _in_memory(value: Any) -> Any:
    """Copy tensors out of the mapped file: the optimizer would otherwise keep it open for the whole run."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _in_memory(inner) for key, inner in value.items()}
    return type(value)(map(_in_memory, value)) if type(value) in (list, tuple) else value
