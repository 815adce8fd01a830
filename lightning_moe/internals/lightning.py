"""Private names of Lightning, as in version 2.6.6."""

from __future__ import annotations

from typing import Any


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
