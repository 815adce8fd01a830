"""When Lightning logs metrics."""

from __future__ import annotations

import lightning.pytorch as pl


def log_interval(trainer: pl.Trainer) -> int:
    """Return the number of optimizer steps between two logged ones (``trainer.log_every_n_steps``), at least 1."""
    return max(1, int(trainer.log_every_n_steps))  # type: ignore[attr-defined]


class LoggingClock:
    """Says whether the metrics of an optimizer step are those that Lightning will log."""

    def __init__(self) -> None:
        self._last_step = 0

    def start(self, trainer: pl.Trainer) -> None:
        """Start to count; call it when training starts."""
        self._last_step = trainer.global_step

    def will_be_due(self, trainer: pl.Trainer) -> bool:
        """Return whether the optimizer step that is being made will be logged; ask before it is made."""
        return (trainer.global_step + 1) % log_interval(trainer) == 0

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Return true once per logged optimizer step: in ``on_train_batch_end`` of its last micro-batch."""
        stepped = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        return stepped and trainer.global_step % log_interval(trainer) == 0
