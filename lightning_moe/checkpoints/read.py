"""A checkpoint of any kind as one dictionary, read without running any code in it (decision 32)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_moe.checkpoints import exported, sharded
from lightning_moe.checkpoints.content import check_content, check_header
from lightning_moe.checkpoints.files import HEADER
from lightning_moe.checkpoints.integrity import damage
from lightning_moe.errors import UserError
from lightning_moe.file_schema import refuse_special
from lightning_moe.filenames import CHECKPOINT_FOLDER


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: file of Lightning; folder of a sharded checkpoint; or what ``export`` wrote (a folder for transformers, or
            a ``.safetensors`` file), which has no optimizer state.

    Returns:
        ``hyper_parameters`` (as `LanguageModel.from_hyperparameters` takes them), ``state_dict``, ``global_step``, and
        what else there is: ``optimizer_states``, ``TextDataModule``, …

    Raises:
        UserError: the checkpoint is missing, truncated, or not one of this program.
    """
    content = _read(path)
    check_content(content, path)
    return content


def _read(path: Path) -> dict[str, Any]:
    if exported.is_exported(path):
        return exported.read_exported(path)
    if (path / CHECKPOINT_FOLDER).is_dir():
        raise UserError(f"{path}: is the folder of a run; give a checkpoint of it, as {path / 'checkpoints/last.ckpt'}")
    return sharded.read_sharded(path) if path.is_dir() else _read_file(path)


def read_verified(path: Path) -> dict[str, Any]:
    """Read a checkpoint as `read_checkpoint` does, after checking its checksums (`damage`).

    Loading alone would not notice a wrong bit. An export has no checksums.
    """
    # `read_checkpoint` has the better message for a missing checkpoint and for a run's folder
    is_checkpoint = path.exists() and not exported.is_exported(path) and not (path / CHECKPOINT_FOLDER).is_dir()
    if is_checkpoint and (problem := damage(path)) is not None:
        raise UserError(f"{path}: not a complete checkpoint: it is {problem}")
    return read_checkpoint(path)


def read_header(path: Path) -> dict[str, Any]:
    """Read a checkpoint as `read_checkpoint` does, but of a sharded one neither weights nor optimizer state."""
    if not (path / HEADER).is_file():
        return read_checkpoint(path)
    content = sharded.read_header(path)
    check_header(content, path)
    return content


def _read_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path}: no such file")
    refuse_special(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a file that holds something else makes torch raise anything
        reason = str(error).strip().partition(". ")[0].partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: not a complete checkpoint (truncated or damaged): {reason}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path}: not a checkpoint of this program (it has no 'state_dict')")
    return checkpoint
