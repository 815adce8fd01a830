"""What a run says of how far it is."""

import io
import re

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_moe.training import progress
from lightning_moe.training.progress import StepProgress
from lightning_moe.waits import as_if_reading_waited


class Small(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        self.log("val/loss", self.layer(batch[0]).mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(
    bar: StepProgress, steps: int, ckpt_path: str | None = None, save: str | None = None, log_every_n_steps: int = 50
) -> None:
    data = DataLoader(TensorDataset(torch.randn(12, 2)), batch_size=2)  # 6 batches, 3 steps an epoch
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, accumulate_grad_batches=2, callbacks=[bar], logger=False,
        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
        log_every_n_steps=log_every_n_steps,
    )  # fmt: skip
    trainer.fit(Small(), data, data, ckpt_path=ckpt_path)
    if save:
        trainer.save_checkpoint(save)


def test_the_bar_counts_optimizer_steps_of_the_whole_run_also_when_it_is_resumed(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path_factory.mktemp("run") / "last.ckpt")
    for steps, ckpt_path, first in ((4, None, 0), (8, path, 4)):
        terminal = io.StringIO()
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr("sys.stdout", terminal)
        train(StepProgress(), steps, ckpt_path, path)
        counts = [(int(n), int(of)) for n, of in re.findall(r"Training: .*?(\d+)/(\d+) \[", terminal.getvalue())]
        assert {of for _, of in counts} == {steps}
        done = [n for n, _ in counts]  # not each: ten times a second at most
        assert done == sorted(done)
        assert done[0] == first
        assert done[-1] == steps
        assert "train/loss=" in terminal.getvalue()


def test_a_log_gets_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    train(StepProgress(), 4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert re.fullmatch(r"step 1 of 4, train/loss \d\.\d{4}, about 0 min left", lines[1])
    assert lines[-1].startswith("step 4 of 4, ")
    assert "val/loss " in lines[-1]
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 60.0)
    train(StepProgress(), 4)
    assert "step " not in capsys.readouterr().out


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    bar = StepProgress()
    bar.disable()
    train(bar, 2)
    assert "step " not in capsys.readouterr().out


def test_where_reading_waits_the_loss_is_read_at_logged_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", terminal)
    bar = StepProgress()
    losses = []
    bar.train_batch_ended = bar.on_train_batch_end  # type: ignore[attr-defined]

    def ended(trainer: pl.Trainer, *args: object) -> None:
        bar.train_batch_ended(trainer, *args)  # type: ignore[attr-defined]
        losses.append((trainer.global_step, bar._loss.get("train/loss")))

    monkeypatch.setattr(bar, "on_train_batch_end", ended)
    with as_if_reading_waited():
        train(bar, 6, log_every_n_steps=3)
    shown = {step: {loss for at, loss in losses if at == step} for step in range(1, 7)}
    assert shown[1] == shown[2] == {None}
    assert shown[3] == shown[4] == shown[5] != {None}
    assert shown[6] not in (shown[5], {None})
