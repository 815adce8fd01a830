"""Open a run's folder from Python: its model, its tokenizer and its text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lightning_moe.checkpoints.read import read_verified
from lightning_moe.data import TextDataModule, Tokenizer
from lightning_moe.errors import UserError
from lightning_moe.filenames import CHECKPOINT_FOLDER
from lightning_moe.module import LanguageModel
from lightning_moe.runs.folder import last_checkpoint
from lightning_moe.runs.loading import check_tokenizer, run_data, to_device, tokenizer_of

REMEDY = "open_run(tokenizer=FILE)"


@dataclass(frozen=True)
class OpenedRun:
    """What a run's folder gives.

    Args:
        checkpoint_path: checkpoint that was read.
        step: optimizer steps of its training.
        model: module with weights and routing state, in ``eval()``.
        tokenizer: tokenizer that it was trained with.
    """

    checkpoint_path: Path
    step: int
    model: LanguageModel
    tokenizer: Tokenizer

    @cached_property
    def data(self) -> TextDataModule:
        """The run's data, prepared and set up for evaluation; the first use may read the whole corpus.

        Raises:
            UserError: the checkpoint is not in a run's folder, or the corpus cannot be read.
        """
        return run_data(self.checkpoint_path, "the folder of a run", self.tokenizer)


def open_run(path: str | Path, tokenizer: str | Path | None = None, device: str = "cpu") -> OpenedRun:
    """Read a run's newest whole checkpoint, or one checkpoint or export.

    Args:
        path: folder of a run, a checkpoint of any kind, or an exported folder.
        tokenizer: ``tokenizer.json`` for a checkpoint that holds none.
        device: torch device of the model.

    Raises:
        UserError: there is no checkpoint, it is damaged, or the tokenizer or device cannot be used.
    """
    path = Path(path)
    found = path
    if (path / CHECKPOINT_FOLDER).is_dir():
        newest = last_checkpoint(path)
        if newest is None:
            raise UserError(f"{path}: the run has no checkpoint yet.")
        found = newest
    checkpoint = read_verified(found)
    model = to_device(LanguageModel.from_checkpoint(checkpoint, str(found)), device)
    codec = tokenizer_of(found, checkpoint, None if tokenizer is None else str(tokenizer), REMEDY)
    check_tokenizer(codec, checkpoint, REMEDY)
    return OpenedRun(found, int(checkpoint["global_step"]), model, codec)
