"""Healing under DDP: two processes train what one trains."""

from pathlib import Path

import pytest
import torch
from helpers.foreign_module import make_trainer
from helpers.gloo_pair import GlooPair
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moe.callbacks import LoadBalance, RoutingStateUpdate, ThresholdWarmup
from lightning_moe.hf.pretrained import PretrainedConfig
from lightning_moe.model import DecoderConfig
from lightning_moe.module import LanguageModel
from lightning_moe.optim import OptimizerConfig, ScheduleConfig
from lightning_moe.routing import ExpertThreshold

LENGTH, STEPS, BATCH = 16, 3, 4


def heal(folder: Path, rank: int, world_size: int, threshold: float) -> dict[str, Tensor]:
    """Some steps of a healing; returns what its checkpoint holds."""
    ids = torch.randint(1, 500, (STEPS * BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    windows = [{"input_ids": row[:-1], "labels": row[1:]} for row in ids]
    own = [window for index, window in enumerate(windows) if index % world_size == rank]
    module = LanguageModel(
        DecoderConfig(max_sequence_length=LENGTH),
        ExpertThreshold(ema_decay=0.5, capacity_factor=None),
        OptimizerConfig(matrix_rule="adamw"),
        ScheduleConfig(kind="constant", adamw_warmup_steps=0),
        pretrained=PretrainedConfig(str(folder), train=["routers", "norms"], distill=0.5),
    )
    for layer in module.decoder.moe_layers():
        layer.state["threshold"].fill_(threshold)
    trainer = make_trainer(
        [ThresholdWarmup(), RoutingStateUpdate(), LoadBalance()],
        strategy="ddp" if world_size > 1 else "auto",
        devices=world_size,
    )
    trainer.fit(module, DataLoader(own, batch_size=BATCH // world_size))  # type: ignore[arg-type]
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("threshold", [-2.0, 0.0])
def test_two_processes_train_as_one(gloo_pair: GlooPair, tmp_path: Path, threshold: float) -> None:
    """Above log-probabilities of 0 no token is sent anywhere at first, and routers have gradients of 0."""
    from helpers.hf_models import make_folder

    make_folder("qwen3_moe", tmp_path)
    alone = heal(tmp_path, 0, 1, threshold)
    both = gloo_pair.run(heal, [(tmp_path, rank, 2, threshold) for rank in range(2)])
    assert any("norm" in name for name in alone)
    for name, tensor in alone.items():
        assert torch.equal(both[0][name], both[1][name]), name
        torch.testing.assert_close(
            both[0][name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
