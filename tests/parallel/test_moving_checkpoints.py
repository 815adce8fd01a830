"""A checkpoint of any layout continues under any other: same losses, thresholds and windows as without a stop."""

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.foreign_module import MemoryLogger, make_trainer
from helpers.gloo_pair import GlooPair
from torch import Tensor

from lightning_moe.callbacks import FiniteGuard, LoadBalance, RoutingStateUpdate, ThresholdWarmup
from lightning_moe.cli import main
from lightning_moe.data import LocalFiles, TextDataModule, TokenizerConfig
from lightning_moe.model import DecoderConfig
from lightning_moe.module import LanguageModel
from lightning_moe.optim import OptimizerConfig, ScheduleConfig
from lightning_moe.routing import ExpertThreshold
from lightning_moe.training.checkpoint_files import AtomicCheckpointIO
from lightning_moe.training.strategy import FullyShardedStrategy

pytestmark = pytest.mark.slow
STRATEGIES: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "sharded": {"save_distributed_checkpoint": True},
    "experts": {"expert_parallel_size": 2},
    "experts_sharded": {"expert_parallel_size": 2, "save_distributed_checkpoint": True},
}
LAYOUTS = ("one", "ddp", *STRATEGIES)
BEFORE, AFTER = 3, 3  # optimizer steps


class Windows(pl.Callback):
    """The input windows of this rank, by optimizer step."""

    def __init__(self) -> None:
        self.of_steps: dict[int, list[tuple[int, ...]]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: dict[str, Tensor], index: int) -> None:
        self.of_steps.setdefault(trainer.global_step, []).extend(map(tuple, batch["input_ids"].tolist()))


def train(rank: int, layout: str, folder: Path, steps: int, resume: Path | None, save: Path | None) -> dict[str, Any]:
    torch.manual_seed(0)
    data = TextDataModule(
        LocalFiles([str(folder / "text")]),
        TokenizerConfig(vocab_size=300),
        sequence_length=16,
        global_batch_size=8,
        validation_fraction=0.2,
        cache_dir=str(folder / "cache"),
    )
    sizes = {"hidden_size": 16, "num_layers": 3, "num_attention_heads": 2, "num_experts": 4, "expert_hidden_size": 8}
    config = DecoderConfig(vocab_size=300, max_sequence_length=16, tie_embeddings=True, **sizes)
    module = LanguageModel(
        config,
        ExpertThreshold(ema_decay=0.9, capacity_factor=None),
        OptimizerConfig(),
        ScheduleConfig(kind="constant", adamw_warmup_steps=1),
    )
    strategy: Any = FullyShardedStrategy(**STRATEGIES[layout]) if layout in STRATEGIES else "auto"
    logger, windows = MemoryLogger(), Windows()
    trainer = make_trainer(
        [ThresholdWarmup(), FiniteGuard(), RoutingStateUpdate(), LoadBalance(), windows],
        strategy="ddp" if layout == "ddp" else strategy,
        devices=1 if layout == "one" else 2,
        plugins=[AtomicCheckpointIO()],
        logger=logger,
        log_every_n_steps=1,
        max_epochs=-1,
        max_steps=steps,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume and str(resume), weights_only=True)
    if save is not None:
        trainer.save_checkpoint(save)
    return {
        "losses": [values["train/loss"] for values in logger.logged.values() if "train/loss" in values],
        "state": {name: buffer.clone() for name, buffer in module.named_buffers() if ".state." in name},
        "windows": windows.of_steps,
        "position": data.position,
    }


def run(
    pair: GlooPair, layout: str, folder: Path, steps: int, resume: Path | None = None, save: Path | None = None
) -> dict[str, Any]:
    """Rank 0's answer, with the windows of both ranks."""
    if layout == "one":
        return train(0, layout, folder, steps, resume, save)
    first, second = pair.run(train, [(rank, layout, folder, steps, resume, save) for rank in (0, 1)])
    assert first["position"] == second["position"]
    return first | {"windows": {step: w + second["windows"][step] for step, w in first["windows"].items()}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moving")
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(200)]
    (folder / "text").mkdir()
    for number in range(60):
        (folder / "text" / f"{number}.txt").write_text(" ".join(generator.choices(words, k=40)))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(gloo_pair: GlooPair, folder: Path) -> dict[str, Any]:
    return run(gloo_pair, "one", folder, BEFORE + AFTER)


def assert_continued(found: dict[str, Any], uninterrupted: dict[str, Any]) -> None:
    """The steps after the checkpoint are those of the run that was not interrupted."""
    assert found["losses"] == pytest.approx(uninterrupted["losses"][BEFORE:], abs=1e-5)
    assert found["windows"] == {step: uninterrupted["windows"][step] for step in range(BEFORE, BEFORE + AFTER)}
    assert found["position"] == uninterrupted["position"] == 8 * (BEFORE + AFTER)
    for name, tensor in uninterrupted["state"].items():
        torch.testing.assert_close(found["state"][name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("source", LAYOUTS)
def test_a_checkpoint_continues_under_every_layout(
    gloo_pair: GlooPair, folder: Path, tmp_path: Path, uninterrupted: dict[str, Any], source: str
) -> None:
    path = tmp_path / "a.ckpt"
    run(gloo_pair, source, folder, BEFORE, save=path)
    assert path.is_dir() == ("sharded" in source)
    for target in ("one", "ddp", "fsdp", "experts"):
        assert_continued(run(gloo_pair, target, folder, BEFORE + AFTER, resume=path), uninterrupted)


def test_a_folder_of_an_older_version_continues_under_its_own_strategy(
    gloo_pair: GlooPair, folder: Path, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    path = tmp_path / "old"
    run(gloo_pair, "sharded", folder, BEFORE, save=path)
    header = torch.load(path / "meta.pt", weights_only=True)
    del header["parameter_numbers"]
    torch.save(header, path / "meta.pt")
    assert_continued(run(gloo_pair, "fsdp", folder, BEFORE + AFTER, resume=path), uninterrupted)


@pytest.mark.parametrize("source", ["sharded", "experts_sharded"])
def test_a_converted_checkpoint_is_the_whole_one(
    gloo_pair: GlooPair, folder: Path, tmp_path: Path, uninterrupted: dict[str, Any], source: str
) -> None:
    run(gloo_pair, source, folder, BEFORE, save=tmp_path / "folder")
    assert main(["convert", f"--ckpt_path={tmp_path / 'folder'}", f"--output={tmp_path / 'file'}"]) == 0
    for target in ("one", "experts"):
        assert_continued(run(gloo_pair, target, folder, BEFORE + AFTER, tmp_path / "file"), uninterrupted)
