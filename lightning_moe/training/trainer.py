"""The trainer of a run, and the checkpoint that it starts from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

from lightning_moe.checkpoints.content import check_weights
from lightning_moe.checkpoints.read import read_header
from lightning_moe.data import TextDataModule
from lightning_moe.errors import UserError
from lightning_moe.module import LanguageModel
from lightning_moe.runs.folder import Run
from lightning_moe.runs.loading import tokenizer_text
from lightning_moe.training.checkpoint_files import AtomicCheckpointIO
from lightning_moe.training.continuing import Trained
from lightning_moe.training.gpu_memory import check_accelerator
from lightning_moe.training.memory import keep_freed_memory
from lightning_moe.training.progress import StepProgress

MISSING_METRIC = "Early stopping conditioned on metric"  # a RuntimeError of EarlyStopping


@contextmanager
def misconfiguration_refused() -> Iterator[None]:
    """Turn what Lightning and its callbacks refuse inside the block, such as a missing logger, into a `UserError`."""
    try:
        yield
    except (MisconfigurationException, RuntimeError) as error:
        if not isinstance(error, MisconfigurationException) and not str(error).startswith(MISSING_METRIC):
            raise
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def build_trainer(
    options: Mapping[str, Any],
    run: Run,
    recording: Sequence[Callback],
    callbacks: Sequence[Callback],
    checkpoint_io: AtomicCheckpointIO,
) -> Trainer:
    """Build Lightning's trainer for a run.

    Args:
        options: arguments of `Trainer`, with the user's own callbacks and plugins.
        run: run of the trainer.
        recording: callbacks to call before the user's own, which may need the logger that these bring.
        callbacks: callbacks to call after the user's own.
        checkpoint_io: plugin that writes and reads checkpoints.

    Raises:
        UserError: the arguments do not fit together, or do not fit this machine.
    """
    check_accelerator(options["accelerator"])
    given, plugins = _listed(options["callbacks"]), _listed(options["plugins"])
    shown = options["enable_progress_bar"] is not False and not any(isinstance(bar, ProgressBar) for bar in given)
    own = {
        "callbacks": [*recording, *given, *callbacks, *([StepProgress()] if shown else [])],
        "plugins": [*plugins, checkpoint_io],
        "logger": False,  # `RecordRun` brings the run's own
        "default_root_dir": str(run.folder.absolute()),
        "use_distributed_sampler": False,  # the data module shards its text itself
    }
    try:
        trainer = Trainer(**{**options, **own})
    except UserError:
        raise
    except KeyError as error:  # of a launcher's environment
        raise UserError(f"trainer: the environment variable {error} is missing") from error
    except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    _check_slurm(trainer)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:  # one of the user's own
            callback.dirpath = str(run.checkpoints.absolute())
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    return trainer


def _check_slurm(trainer: Trainer) -> None:
    """Refuse a number of processes that is not that of SLURM, which starts them: data would be divided wrongly."""
    if not SLURMEnvironment.detect():
        return
    processes, tasks = trainer.num_nodes * trainer.num_devices, int(os.environ["SLURM_NTASKS"])
    if processes != tasks:
        raise UserError(
            f"trainer.devices={trainer.num_devices} × trainer.num_nodes={trainer.num_nodes} are {processes} processes, "
            f"but SLURM starts SLURM_NTASKS={tasks}; use --ntasks-per-node={trainer.num_devices} and "
            f"--nodes={trainer.num_nodes}, or SLURM_JOB_NAME=interactive for a process without srun"
        )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


@dataclass(frozen=True)
class Start:
    """What a trainer starts from.

    Args:
        checkpoint_io: plugin that gives the content of the checkpoint to the trainer without reading it again.
        steps: number of optimizer steps done.
        trained: how the checkpoint was trained; `None` without a checkpoint, or if it does not say so.
        tokenizer: content of the tokenizer's file in the checkpoint; `None` without one.
    """

    checkpoint_io: AtomicCheckpointIO
    steps: int = 0
    trained: Trained | None = None
    tokenizer: str | None = None

    def prepare(self, data: TextDataModule, config: str) -> None:
        """Give the data the checkpoint's tokenizer, unless the configuration asks for another one."""
        if self.trained is not None and self.tokenizer is not None:
            asked, used = (one["data"].get("tokenizer") for one in (yaml.safe_load(config), self.trained.config))
            if asked == used:
                data.adopt_tokenizer(self.tokenizer)


def open_checkpoint(path: Path | None, model: LanguageModel, training: bool) -> Start:
    """Read a checkpoint, and refuse one that does not fit.

    Args:
        path: path of the checkpoint, with verified checksums; `None` for none.
        model: model for the checkpoint.
        training: whether training continues from it.

    Raises:
        UserError: it is no checkpoint of this program, has another architecture, or lacks the optimizer state for
            training.
    """
    if path is None:
        return Start(AtomicCheckpointIO())
    content = _read_fitting(path, model, "ckpt_path")
    if training and not content.get("optimizer_states", path.is_dir()):
        raise UserError(
            f"ckpt_path: {path}: has no optimizer state, so its training cannot go on; start from its weights with "
            f"--model.init_from={path}"
        )
    if "state_dict" in content:  # of shards, torch compares the shapes
        check_weights(model.state_dict(), content["state_dict"], f"ckpt_path: {path}")
    steps, trained = content["global_step"], Trained.of_checkpoint(content, str(path))
    return Start(AtomicCheckpointIO(path, content), steps, trained, tokenizer_text(content))


def check_initial_weights(model: LanguageModel) -> dict[str, Any] | None:
    """Refuse weights to start from (`LanguageModel.init_from`) that do not fit.

    Returns:
        The content of their checkpoint without the weights; `None` if the model starts from random ones.
    """
    if model.init_from is None:
        return None
    content = _read_fitting(Path(model.init_from), model, "model.init_from")
    if "state_dict" in content:
        check_weights(model.state_dict(), content["state_dict"], f"model.init_from: {model.init_from}")
    return {key: content[key] for key in ("hyper_parameters", "TextDataModule") if key in content}


def _read_fitting(path: Path, model: LanguageModel, key: str) -> dict[str, Any]:
    try:
        content = read_header(path)
        model.check_architecture(path, content)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    return content
