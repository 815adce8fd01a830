"""Whole training steps of `fit`, callbacks included: between two logged ones the host does not wait for the device."""

from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers.reading import numbers_read
from helpers.small_run import Command

from lightning_moe.training import run
from lightning_moe.waits import as_if_reading_waited

pytestmark = pytest.mark.gpu
LOGGED_EVERY = 6
#: what step 5 logs is written when step 6 has begun, and step 11 logs again
QUIET = range(LOGGED_EVERY + 1, 2 * LOGGED_EVERY - 1)


class RefuseWaits(pl.Callback):
    """Lets torch raise an error where the host waits in a quiet step; on the CPU, counts what would wait."""

    def __init__(self, device: torch.device, found: list[tuple[str, str]]) -> None:
        self.on_gpu, self.found, self.seen = device.type == "cuda", found, 0
        self.begin = self.end = 0

    def on_train_batch_start(self, *_: object) -> None:
        if self.seen == QUIET.start:
            self.begin = len(self.found)
            self._mode("error")
        elif self.seen == QUIET.stop:
            self.end = len(self.found)
            self._mode("default")
        self.seen += 1

    def on_exception(self, *_: object) -> None:
        self._mode("default")

    def _mode(self, mode: str) -> None:
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("routing", ["expert_threshold", "token_choice_loss_free", "quantile_balancing", "dense"])
def test_nothing_waits_between_logged_steps(
    routing: str,
    command: Command,
    flags: tuple[str, ...],
    workplace: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = run.build_trainer
    watch = numbers_read() if device.type == "cpu" else nullcontext([])  # on a GPU, torch's own mode judges
    with as_if_reading_waited(), watch as found:
        refuse = RefuseWaits(device, found)
        monkeypatch.setattr(
            run, "build_trainer", lambda options, *rest: build({**options, "callbacks": [refuse]}, *rest)
        )
        code, _, err = command(
            "fit", "--config=small", *flags, f"--config=routing/{routing}", "--trainer.max_steps=18",
            "--trainer.val_check_interval=1000", f"--trainer.log_every_n_steps={LOGGED_EVERY}",
        )  # fmt: skip
    assert code == 0, err
    assert refuse.seen == 18
    assert found[refuse.begin : refuse.end] == []
    assert device.type == "cuda" or len(found) > refuse.end > 0, "what is logged is read"
