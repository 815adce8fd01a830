"""Fifty steps of Muon with clipping by the global norm: two processes under every strategy lose what one loses."""

import functools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.foreign_module import MemoryLogger, global_batches, make_trainer, micro_batches, tiny_config
from helpers.gloo_pair import GlooPair
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_moe.callbacks import RoutingStateUpdate, ThresholdWarmup
from lightning_moe.module import LanguageModel
from lightning_moe.optim import OptimizerConfig, ScheduleConfig
from lightning_moe.routing import ExpertThreshold
from lightning_moe.training.strategy import FullyShardedStrategy

STEPS, CLIP = 50, 0.1


class GradientNorms(pl.Callback):
    """The norm over all parameters and ranks, before and after clipping, of each step."""

    def __init__(self) -> None:
        self.before: list[float] = []
        self.after: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.before.append(global_norm(pl_module))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.after.append(global_norm(pl_module))  # they stay until the next backward pass


def global_norm(module: pl.LightningModule) -> float:
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
    return float(torch.stack([grad.norm() for grad in whole]).norm())


def train(strategy: str, rank: int = 0) -> tuple[list[float], list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms before and after clipping, and the weights in the end."""
    options: dict[str, Any] = {
        "one": {"strategy": "auto"},
        "ddp": {"strategy": "ddp"},
        "fsdp": {"strategy": FullyShardedStrategy()},
        "expert parallel": {"strategy": FullyShardedStrategy(expert_parallel_size=2)},
    }[strategy]
    world_size = 1 if strategy == "one" else 2
    torch.manual_seed(0)
    module = LanguageModel(
        tiny_config(),
        ExpertThreshold(ema_decay=0.9, capacity_factor=None),
        OptimizerConfig(),
        ScheduleConfig(adamw_warmup_steps=1),
    )
    logger, norms = MemoryLogger(), GradientNorms()
    trainer = make_trainer(
        [ThresholdWarmup(), RoutingStateUpdate(), norms],
        devices=world_size,
        logger=logger,
        log_every_n_steps=1,
        gradient_clip_val=CLIP,
        **options,
    )
    trainer.fit(module, micro_batches(global_batches(STEPS), 1, rank, world_size))
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in module.named_parameters()
    }
    return [values["train/loss"] for values in logger.logged.values()], norms.before, norms.after, weights


train_alone = functools.cache(train)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "expert parallel"])
def test_fifty_steps_are_those_of_one_process(gloo_pair: GlooPair, strategy: str) -> None:
    losses, norms, _, weights = train_alone("one")
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5  # it learned
    assert sum(norm > CLIP for norm in norms) > STEPS // 2  # else clipping would not be tested

    ours = gloo_pair.run(train, [(strategy, 0), (strategy, 1)])
    for other_losses, before, after, other_weights in ours:
        error = (torch.tensor(other_losses) - torch.tensor(losses)).abs().max()
        drift = max(float((other_weights[name] - weights[name]).abs().max()) for name in weights)
        print(f"{strategy}: losses within {error:.1e}, weights within {drift:.1e}")
        assert other_losses == pytest.approx(losses, abs=1e-4)
        assert before == pytest.approx(norms, rel=1e-3)
        # Muon and AdamW hardly notice the scale of a gradient, so the losses alone would not show a wrong clipping
        assert after == pytest.approx([min(norm, CLIP) for norm in norms], rel=1e-3)
