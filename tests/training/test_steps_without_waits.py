"""Whole training steps: what the host reads from the device between two logged ones, callbacks included.

The CPU stands in for a GPU: `as_if_reading_waited`, and the reading operations are collected.
"""

from pathlib import Path

import lightning.pytorch as pl
import pytest
from helpers.reading import numbers_read
from helpers.small_run import Command

from lightning_moe.training import run
from lightning_moe.waits import as_if_reading_waited

LOGGED_EVERY = 6


class Marks(pl.Callback):
    """Notes how many numbers the host had read when each step began."""

    def __init__(self, found: list[tuple[str, str]]) -> None:
        self.found, self.at = found, list[int]()

    def on_train_batch_start(self, *_: object) -> None:
        self.at.append(len(self.found))


@pytest.mark.parametrize("routing", ["expert_threshold", "token_choice_loss_free", "quantile_balancing", "dense"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_nothing_is_read_between_logged_steps(
    routing: str, accumulate: int, command: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = run.build_trainer
    with as_if_reading_waited(), numbers_read() as found:
        marks = Marks(found)

        def build_with_marks(options: dict, *rest: object) -> pl.Trainer:
            return build({**options, "callbacks": [marks]}, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(run, "build_trainer", build_with_marks)
        code, _, err = command(
            "fit", "--config=small", f"--config=routing/{routing}", "--trainer.max_steps=18",
            "--trainer.val_check_interval=1000", f"--trainer.log_every_n_steps={LOGGED_EVERY}",
            f"--trainer.accumulate_grad_batches={accumulate}", "--trainer.enable_progress_bar=true",
        )  # fmt: skip
    assert code == 0, err
    steps = [marks.at[batch] for batch in range(0, 18 * accumulate, accumulate)]
    # step 5 logs, and what it logs is written when step 6 has begun
    quiet = found[steps[LOGGED_EVERY + 1] : steps[2 * LOGGED_EVERY - 1]]
    assert quiet == []
    assert found[steps[2 * LOGGED_EVERY - 1] : steps[2 * LOGGED_EVERY + 1]], "what is logged is read"
