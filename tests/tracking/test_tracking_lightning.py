"""The logger under a real Trainer: the record of a run that was stopped and resumed is that of one that was not."""

import json
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.image import imread
from torch.utils.data import DataLoader, TensorDataset

from lightning_moe.callbacks import LoadBalance
from lightning_moe.model.config import DecoderConfig
from lightning_moe.module import LanguageModel
from lightning_moe.tracking import LogLoadFigure, MLflowLogger, RewindMetrics, load_figure, read_metrics


class Tiny(LightningModule):
    """Least squares on fixed data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Stop(Callback):
    def __init__(self, step: int, error: type[BaseException]) -> None:
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise self.error("stopped by the test")


def fit(run_dir: Path, ckpt_path: str | None = None, stop: Stop | None = None, **settings) -> MLflowLogger:
    seed_everything(0)
    logger = MLflowLogger(**{"enabled": False, **settings})
    logger.bind(run_dir)
    data = TensorDataset(torch.ones(40, 3))  # every batch the same: exact data resume is not the subject here
    trainer = Trainer(
        accelerator="cpu",
        max_steps=20,
        logger=logger,
        log_every_n_steps=1,
        val_check_interval=4,
        callbacks=[
            RewindMetrics(),
            ModelCheckpoint(run_dir / "checkpoints", save_last=True, every_n_train_steps=6),
            *([stop] if stop else []),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Tiny(), DataLoader(data, batch_size=2), DataLoader(data, batch_size=20), ckpt_path=ckpt_path)
    return logger


def points(run_dir: Path) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "time"} for line in read_metrics(run_dir)]


def statuses(run_dir: Path) -> list[str]:
    journal = [json.loads(line) for line in (run_dir / "tracking.jsonl").read_text().splitlines()]
    return [event.get("status", "RUNNING") for event in journal if event["event"] in ("start", "end")]


def test_the_record_of_a_resumed_run_is_that_of_an_uninterrupted_one(tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(whole)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(parts, stop=Stop(9, RuntimeError))
    assert max(line["step"] for line in points(parts)) == 8  # beyond the checkpoint of step 6

    logger = fit(parts, ckpt_path=str(parts / "checkpoints" / "last.ckpt"))

    assert points(parts) == points(whole)
    assert len(points(whole)) == 25
    assert statuses(whole) == ["RUNNING", "FINISHED"]
    assert statuses(parts) == ["RUNNING", "FAILED", "RUNNING", "FINISHED"]
    journal = (parts / "tracking.jsonl").read_text()
    assert '"resumed_from_step": "6"' in journal
    assert Path(logger.save_dir) == parts


def test_an_interrupted_run_is_killed(tmp_path: Path):
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit(tmp_path / "run", stop=Stop(3, KeyboardInterrupt))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning turns it off
    assert statuses(tmp_path / "run") == ["RUNNING", "KILLED"]


@pytest.mark.slow
def test_a_resumed_run_is_one_run_in_mlflow(tmp_path: Path, store: str):
    from mlflow import MlflowClient

    run_dir = tmp_path / "runs" / "one"
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(run_dir, stop=Stop(9, RuntimeError), enabled=True, tracking_uri=store)
    logger = fit(run_dir, ckpt_path=str(run_dir / "checkpoints" / "last.ckpt"), enabled=True, tracking_uri=store)
    logger.close()

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("lightning_moe")
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("one", "FINISHED")
    newest = {point.step: point for point in client.get_metric_history(run.info.run_id, "train/loss")}
    expected = {line["step"]: line["train/loss"] for line in points(run_dir) if "train/loss" in line}
    assert {step: point.value for step, point in newest.items()} == expected
    assert sorted(expected) == list(range(20))
    assert run.data.tags["resumed_from_step"] == "6"


def test_every_validation_leaves_a_picture_of_its_load(tmp_path: Path):
    model = LanguageModel(
        DecoderConfig(
            vocab_size=32, max_sequence_length=8, num_layers=3, hidden_size=16, num_attention_heads=2, num_experts=4
        )
    )
    tokens = torch.randint(0, 32, (4, 8))
    windows = [{"input_ids": row, "labels": row} for row in tokens]
    logger = MLflowLogger(enabled=False)
    logger.bind(tmp_path / "run")
    balance = LoadBalance()
    trainer = Trainer(accelerator="cpu", logger=logger, callbacks=[balance, LogLoadFigure()], enable_progress_bar=False)
    with warnings.catch_warnings(action="ignore"):
        trainer.validate(model, DataLoader(windows, batch_size=2), verbose=False)

    picture = imread(tmp_path / "run" / "figures" / "load.png")[..., :3]
    assert balance.evaluation_load is not None
    title = "Load in validation after 0 steps"
    logger.log_figure(load_figure(balance.evaluation_load, ["1", "2"], title), "expected")
    np.testing.assert_array_equal(picture, imread(tmp_path / "run" / "figures" / "expected.png")[..., :3])
    logger.close()
