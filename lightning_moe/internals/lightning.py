"""Private names of Lightning, as in version 2.6.6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NotRequired

from annotated_types import Interval, Len
from typing_extensions import TypedDict


def set_logged_step(trainer: Any, step: int) -> None:
    """Let Lightning log the next metrics under an optimizer step.

    Lightning 2.6.6 keeps the step in ``trainer.fit_loop.epoch_loop._batches_that_stepped`` and offers no setter. On an
    upgrade, look in ``_LoggerConnector.log_metrics`` for the step that it takes if none is given.

    Args:
        trainer: `lightning.pytorch.Trainer` of the run.
        step: number of optimizer steps before the logged one.
    """
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped  # noqa: B018 - an assignment alone would not notice that the name is gone
    loop._batches_that_stepped = step


def launches_by_command(strategy: Any) -> bool:
    """Return whether a `DDPStrategy` starts its processes by running the command again, without fork or spawn.

    Lightning 2.6.6 keeps the argument ``start_method`` in ``_start_method``; ``popen`` is the command. On an upgrade,
    look in ``DDPStrategy._configure_launcher`` for what chooses the launcher.
    """
    return bool(strategy._start_method == "popen")


def set_data_parallel_size(strategy: Any, processes: int) -> None:
    """Let a `ModelParallelStrategy` take this number of processes as data parallel, once the number is known.

    Lightning 2.6.6 reads ``_data_parallel_size`` in ``setup_environment``; its constructor wants the number before
    that. On an upgrade, see whether the constructor can derive it.
    """
    strategy._data_parallel_size  # noqa: B018 - see above
    strategy._data_parallel_size = processes


def saves_sharded(strategy: Any) -> bool:
    """Return whether a `ModelParallelStrategy` writes checkpoints as folders, with a file per process.

    Lightning 2.6.6 keeps the argument ``save_distributed_checkpoint`` in ``_save_distributed_checkpoint``. On an
    upgrade, look in ``ModelParallelStrategy.save_checkpoint`` for what makes it write a folder.
    """
    return bool(strategy._save_distributed_checkpoint)


def attached_trainer(module: Any) -> Any:
    """Return the trainer of a `LightningModule`, or `None` outside of one.

    Lightning 2.6.6 keeps it in ``_trainer``; the public ``trainer`` raises an error if there is none. On an upgrade,
    look at the property ``LightningModule.trainer``.
    """
    return module._trainer


def begin_with_validation(checkpoint: dict[str, Any]) -> None:
    """Change a checkpoint that is written inside of a validation so that resuming begins with that validation.

    Lightning 2.6.6 resumes a validation whose counters say that one batch was started and none is done. On an upgrade,
    look in ``_TrainingEpochLoop.on_advance_start`` and ``_EvaluationLoop.reset`` for how they read the counters.

    Args:
        checkpoint: content of the checkpoint, changed in place.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        counts |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}


_Number = Annotated[int, Interval(ge=0, lt=2**62)]


class _Counts(TypedDict):
    ready: NotRequired[_Number]
    started: NotRequired[_Number]
    processed: NotRequired[_Number]
    completed: _Number


class _Progress(TypedDict):
    total: _Counts
    current: _Counts


class _BatchProgress(_Progress):
    is_last_batch: bool


class _OptimizerProgress(TypedDict):
    step: _Progress
    zero_grad: _Progress


class _Optimization(TypedDict):
    optimizer: _OptimizerProgress


class _CombinedLoader(TypedDict):
    combined_loader: NotRequired[Annotated[list[dict[str, Any]], Len(0, 1)]]


class _EpochState(TypedDict):
    _batches_that_stepped: NotRequired[_Number]


_FitLoop = TypedDict(
    "_FitLoop",
    {
        "state_dict": _CombinedLoader,
        "epoch_loop.state_dict": _EpochState,
        "epoch_loop.batch_progress": _BatchProgress,
        "epoch_loop.scheduler_progress": _Progress,
        "epoch_loop.automatic_optimization.state_dict": dict[str, Any],
        "epoch_loop.automatic_optimization.optim_progress": _Optimization,
        "epoch_loop.manual_optimization.state_dict": dict[str, Any],
        "epoch_loop.manual_optimization.optim_step_progress": _Progress,
        "epoch_loop.val_loop.state_dict": dict[str, Any],
        "epoch_loop.val_loop.batch_progress": _BatchProgress,
        "epoch_progress": _Progress,
    },
)


class _EvaluationLoop(TypedDict):
    state_dict: dict[str, Any]
    batch_progress: _BatchProgress


class _PredictionLoop(TypedDict):
    state_dict: dict[str, Any]
    batch_progress: _Progress


class LoopStates(TypedDict):
    """The entry ``loops`` of a checkpoint: the counters of the loops.

    Lightning 2.6.6 takes over whatever stands there (`_Loop.load_state_dict`). On an upgrade, look at the entry of a
    new checkpoint; a later version may have more keys, which are left alone here.
    """

    fit_loop: _FitLoop
    validate_loop: _EvaluationLoop
    test_loop: _EvaluationLoop
    predict_loop: _PredictionLoop


def optimizer_steps_of(loops: Mapping[str, Any]) -> int:
    """Return the optimizer steps that the entry ``loops`` of a checkpoint has counted; see `LoopStates`."""
    fit = loops["fit_loop"]
    automatic = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    manual = fit["epoch_loop.manual_optimization.optim_step_progress"]
    return int(automatic["total"]["completed"] + manual["total"]["completed"])
