"""What an exact resume needs of Lightning's Trainer."""

from typing import Any

import lightning.pytorch as pl

from lightning_moe.errors import UserError
from lightning_moe.internals.lightning import set_logged_step


def check_trainer(trainer: Any, batches_per_epoch: int) -> None:
    """Refuse settings under which a step would not have all its samples, or would not take the next ones."""
    if trainer.overfit_batches > 0:
        raise UserError(
            f"trainer.overfit_batches={trainer.overfit_batches} is not supported: the training order goes through "
            "the whole split. To overfit on purpose, train on a small corpus."
        )
    limit, accumulate = trainer.limit_train_batches, trainer.accumulate_grad_batches
    batches = min(limit, batches_per_epoch) if isinstance(limit, int) else int(limit * batches_per_epoch)
    if batches % accumulate and not trainer.fast_dev_run:
        raise UserError(
            f"trainer.limit_train_batches={limit} gives {batches} batches, which is not a multiple of "
            f"trainer.accumulate_grad_batches={accumulate}: the last optimizer step would be incomplete."
        )


def align_batch_progress(trainer: pl.Trainer) -> None:
    """Set Lightning's batch counters to the last finished optimizer step.

    The counters differ from it if a checkpoint was written between two micro-batches of a step, or with another
    `accumulate_grad_batches`. Lightning would continue with the rest of that step, without the gradients of its first
    part.
    """
    if not trainer.lightning_module.automatic_optimization:
        return  # such a module accumulates, and counts, in its own way
    loop = trainer.fit_loop.epoch_loop
    steps = loop.automatic_optimization.optim_progress.optimizer.step
    progress: Any = loop.batch_progress
    saved_in_batch_end = progress.current.processed == progress.current.completed + 1
    finished = progress.current.completed + int(saved_in_batch_end)
    if finished == steps.current.completed * trainer.accumulate_grad_batches:
        return
    for batches, optimizer_steps in ((progress.current, steps.current), (progress.total, steps.total)):
        count = optimizer_steps.completed * trainer.accumulate_grad_batches
        batches.ready = batches.started = batches.processed = batches.completed = count
    set_logged_step(trainer, steps.total.completed)
