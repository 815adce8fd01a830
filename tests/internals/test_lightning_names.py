"""Lightning's private names do what `internals.lightning` says; each test fails when an upgrade changes a name."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from lightning_moe.internals import lightning as names


class Steps(Logger):
    """Keeps the step under which each metric is logged."""

    name = version = None

    def __init__(self) -> None:
        self.steps: list[int | None] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.steps += [step] if "loss" in metrics or "val" in metrics else []

    def log_hyperparams(self, *_: object, **__: object) -> None:
        pass


class Small(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.validated: list[int] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validated.append(batch_idx)
        self.log("val", self.layer(batch).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, *callbacks: Callback, logger: Logger | None = None, steps: int = 4) -> Trainer:
    return Trainer(
        accelerator="cpu", max_steps=steps, log_every_n_steps=1, callbacks=list(callbacks), logger=logger or False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, num_sanity_val_steps=0,
        val_check_interval=2, default_root_dir=folder,
    )  # fmt: skip


def data() -> DataLoader[torch.Tensor]:
    return DataLoader(torch.ones(6, 2))  # type: ignore[arg-type]


class FromTen(Callback):
    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        names.set_logged_step(trainer, 10 + trainer.global_step)


def test_metrics_are_logged_under_the_step_that_is_set(tmp_path: Path) -> None:
    logger = Steps()
    one = trainer(tmp_path, FromTen(), logger=logger)
    one.fit(Small(), data())
    assert logger.steps == [10, 11, 12, 13]
    names.set_logged_step(one, 77)
    one.validate(Small(), data(), verbose=False)
    assert logger.steps[-1] == 77


@pytest.mark.parametrize(("name", "launched"), [("ddp", True), ("ddp_spawn", False), ("ddp_fork", False)])
def test_how_a_strategy_starts_its_processes(name: str, launched: bool) -> None:
    strategy = Trainer(accelerator="cpu", devices=2, strategy=name, logger=False).strategy
    assert isinstance(strategy, DDPStrategy)
    assert names.launches_by_command(strategy) == launched


def test_the_data_parallel_size_is_what_the_mesh_has(tmp_path: Path) -> None:
    strategy = ModelParallelStrategy(data_parallel_size=7, tensor_parallel_size=1, process_group_backend="gloo")
    names.set_data_parallel_size(strategy, 1)
    one = Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, default_root_dir=tmp_path)
    one.strategy.connect(Small())
    with patch.dict(os.environ):
        one.strategy.setup_environment()
    try:
        assert one.strategy.device_mesh["data_parallel"].size() == 1
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sharded", [True, False])
def test_whether_checkpoints_are_folders(sharded: bool) -> None:
    assert names.saves_sharded(ModelParallelStrategy(save_distributed_checkpoint=sharded)) == sharded


def test_the_trainer_of_a_module(tmp_path: Path) -> None:
    module = Small()
    assert names.attached_trainer(module) is None
    one = trainer(tmp_path)
    one.fit(module, data())
    assert names.attached_trainer(module) is one


class SaveInValidation(Callback):
    """Writes a checkpoint at the second batch of the validation, and leaves."""

    def on_validation_batch_start(
        self, trainer: Trainer, module: Small, batch: object, batch_idx: int, *_: int
    ) -> None:
        if batch_idx == 1 and trainer.global_step == 2:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "in.ckpt")
            raise KeyError("stopped")

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, object]) -> None:
        names.begin_with_validation(checkpoint)


def test_resuming_begins_with_the_whole_validation(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="stopped"):
        trainer(tmp_path, SaveInValidation()).fit(Small(), data(), data())
    module, logger = Small(), Steps()
    trainer(tmp_path, logger=logger).fit(module, data(), data(), ckpt_path=tmp_path / "in.ckpt", weights_only=True)
    assert module.validated == [*range(6), *range(6)]  # after steps 2 and 4
    assert logger.steps[0] == 1  # that after step 2, before any other step
