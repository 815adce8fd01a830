"""Under a real Trainer: accumulation, clipping, the schedule and checkpoints do what a hand-written loop does."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_moe.optim import OptimizerConfig, ScheduleConfig, build_optimizer, build_schedule

EPOCHS, STEPS_PER_EPOCH, ACCUMULATE, CLIP = 2, 3, 2, 0.05
STEPS = EPOCHS * STEPS_PER_EPOCH
SCHEDULE = ScheduleConfig("cosine", adamw_warmup_steps=3)


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.experts = nn.Parameter(torch.randn(3, 8, 12) / 8)
        self.head = nn.Linear(12, 11)

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        hidden = torch.einsum("bsd,edh->bsh", self.embedding(tokens), self.experts)
        return nn.functional.cross_entropy(self.head(hidden[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self, OptimizerConfig())
        schedule = build_schedule(optimizer, SCHEDULE, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def batches() -> DataLoader:
    tokens = torch.randint(0, 11, (STEPS_PER_EPOCH * ACCUMULATE * 2, 5), generator=torch.Generator().manual_seed(0))
    return DataLoader(tokens, batch_size=2)  # type: ignore[arg-type]


def fit(folder: Path, ckpt_path: Path | None = None, stop: int | None = None) -> Model:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == stop

    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, accumulate_grad_batches=ACCUMULATE, gradient_clip_val=CLIP, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Stop()],
        default_root_dir=folder,
    )  # fmt: skip
    model = Model()
    trainer.fit(model, batches(), ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return model


def test_training_equals_a_hand_written_loop(tmp_path: Path) -> None:
    expected = Model()
    before = [p.detach().clone() for p in expected.parameters()]
    optimizer = build_optimizer(expected, OptimizerConfig())
    schedule = build_schedule(optimizer, SCHEDULE, STEPS)
    ordered = [p for group in optimizer.param_groups for p in group["params"]]  # the norm's order of summation
    for i, tokens in enumerate(list(batches()) * EPOCHS):
        (expected.training_step(tokens, i) / ACCUMULATE).backward()
        if i % ACCUMULATE == ACCUMULATE - 1:
            assert nn.utils.clip_grad_norm_(ordered, CLIP) > CLIP  # else this would test nothing
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    found = fit(tmp_path)
    for old, one, other in zip(before, expected.parameters(), found.parameters(), strict=True):
        assert not torch.equal(old, one)
        assert torch.equal(one, other)


def test_resume_equals_not_having_stopped(tmp_path: Path) -> None:
    whole = fit(tmp_path)
    stopped = fit(tmp_path, stop=STEPS_PER_EPOCH)
    resumed = fit(tmp_path, ckpt_path=tmp_path / "last.ckpt")
    for one, half, other in zip(whole.parameters(), stopped.parameters(), resumed.parameters(), strict=True):
        assert not torch.equal(one, half)
        assert torch.equal(one, other)
