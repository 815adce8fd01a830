"""The LightningModule under two processes and every precision: equal training, fp32 routing in every checkpoint."""

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from helpers.foreign_module import MemoryLogger, global_batches, make_trainer, micro_batches, tiny_config
from helpers.gloo_pair import GlooPair
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_moe.callbacks import FiniteGuard, LoadBalance, RoutingStateUpdate, ThresholdWarmup, Throughput
from lightning_moe.module import LanguageModel
from lightning_moe.optim import OptimizerConfig, ScheduleConfig
from lightning_moe.routing import ExpertThreshold, RoutingRule, TokenChoiceAuxLoss

RULE = ExpertThreshold(ema_decay=0.9, capacity_factor=None)


def routing_of(module: LanguageModel) -> dict[str, Tensor]:
    """Router weights (whole, where sharded) and routing state."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    routing = {name: tensor.detach() for name, tensor in named.items() if ".router." in name or ".state." in name}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in routing.items()}


class AtStart(pl.Callback):
    """The routing state that training starts from."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        self.routing = routing_of(pl_module)


def train(
    strategy: str,
    precision: str,
    rank: int = 0,
    save: Path | None = None,
    resume: Path | None = None,
    matrix_rule: Literal["muon", "adamw"] = "adamw",
    accumulate: int = 1,
    steps: int = 4,
    rule: RoutingRule = RULE,
) -> dict[str, Any]:
    """Some steps, from ``resume`` or from the start; dcp is FSDP2 with one file per process."""
    strategies: dict[str, Any] = {"auto": "auto", "ddp": "ddp"}
    if strategy in ("fsdp", "dcp"):
        strategies[strategy] = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=strategy == "dcp"
        )
    world_size = 1 if strategy == "auto" else 2
    torch.manual_seed(0)
    module = LanguageModel(
        tiny_config(), rule, OptimizerConfig(matrix_rule=matrix_rule), ScheduleConfig(adamw_warmup_steps=1)
    )
    logger, start = MemoryLogger(), AtStart()
    trainer = make_trainer(
        [ThresholdWarmup(), FiniteGuard(), RoutingStateUpdate(), LoadBalance(), Throughput(), start],
        strategy=strategies[strategy],
        devices=world_size,
        precision=precision,
        logger=logger,
        log_every_n_steps=1,
        max_epochs=1 if resume is None else 2,
        accumulate_grad_batches=accumulate,
    )
    batches = micro_batches(global_batches(steps), accumulate, rank, world_size)
    trainer.fit(module, batches, micro_batches(global_batches(2), 1, rank, world_size), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    sample = module.generate(torch.tensor([[1, 2]]), 3, temperature=0.0)
    logged = list(logger.logged.values())
    return {
        "train": [values["train/loss"] for values in logged if "train/loss" in values],
        "aux": [values["train/aux_loss"] for values in logged if "train/aux_loss" in values],
        "val": [values["val/loss"] for values in logged if "val/loss" in values],
        "routing": routing_of(module),
        "start": start.routing,
        "sample": sample,
    }


def run(pair: GlooPair, strategy: str, precision: str, save: Path | None = None, resume: Path | None = None) -> Any:
    """Rank 0's answer; both must log and hold the same."""
    if strategy == "auto":
        return train(strategy, precision, 0, save, resume)
    first, second = pair.run(train, [(strategy, precision, rank, save, resume) for rank in (0, 1)])
    assert first["val"] == second["val"]
    assert all(torch.equal(first["routing"][name], second["routing"][name]) for name in first["routing"])
    return first


@pytest.mark.parametrize(
    ("strategy", "precision", "tolerance"),
    [
        ("ddp", "32-true", 1e-5),
        ("fsdp", "32-true", 1e-5),
        pytest.param("ddp", "bf16-mixed", 5e-3, marks=pytest.mark.slow),
        pytest.param("fsdp", "bf16-mixed", 5e-3, marks=pytest.mark.slow),
        pytest.param("ddp", "bf16-true", 2e-2, marks=pytest.mark.slow),
        pytest.param("fsdp", "bf16-true", 2e-2, marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one(gloo_pair: GlooPair, strategy: str, precision: str, tolerance: float) -> None:
    """Within the rounding of the precision; `val/loss` is over all ranks' tokens."""
    one, two = run(gloo_pair, "auto", precision), run(gloo_pair, strategy, precision)
    assert len(one["train"]) == 4
    assert two["train"] == pytest.approx(one["train"], abs=tolerance)
    assert two["val"] == pytest.approx(one["val"], abs=tolerance)
    for name, tensor in one["routing"].items():
        assert two["routing"][name].dtype == tensor.dtype
        torch.testing.assert_close(two["routing"][name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(("strategy", "accumulate"), [("auto", 2), ("ddp", 2)])
def test_the_logged_auxiliary_loss_is_that_of_the_global_batch(
    gloo_pair: GlooPair, strategy: str, accumulate: int
) -> None:
    """The auxiliary loss is a mean over tokens, so a run that does not split its batches computes the same."""
    rule = TokenChoiceAuxLoss(aux_loss_coef=0.5, normalized=False)
    one = train("auto", "32-true", rule=rule)
    ranks = [(strategy, "32-true", rank, None, None, "adamw", accumulate, 4, rule) for rank in (0, 1)]
    other = train(*ranks[0]) if strategy == "auto" else gloo_pair.run(train, ranks)[0]
    assert len(one["aux"]) == 4
    assert other["aux"] == pytest.approx(one["aux"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "accumulate"), [("auto", 4), ("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)])
def test_muon_trains_alike_in_every_layout(gloo_pair: GlooPair, strategy: str, accumulate: int) -> None:
    """In fp32 the orthogonalisation is fp32 too: bfloat16 would amplify the rounding of the gradients' sums."""
    one = train("auto", "32-true", matrix_rule="muon", steps=20)
    if strategy == "auto":
        other = train(strategy, "32-true", 0, None, None, "muon", accumulate, 20)
    else:
        ranks = [(strategy, "32-true", rank, None, None, "muon", accumulate, 20) for rank in (0, 1)]
        other = gloo_pair.run(train, ranks)[0]
    assert len(one["train"]) == 20
    assert one["train"][-1] < one["train"][0] - 0.1
    assert other["train"] == pytest.approx(one["train"], abs=1e-4)
    for name in one["routing"]:
        if ".state." in name:
            torch.testing.assert_close(other["routing"][name], one["routing"][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(
    ("strategy", "other"), [("auto", "fsdp"), ("ddp", "auto"), ("fsdp", "auto"), ("fsdp", "ddp"), ("dcp", "dcp")]
)
@pytest.mark.slow
def test_routing_survives_every_checkpoint_bit_for_bit(
    gloo_pair: GlooPair, tmp_path: Path, strategy: str, other: str, precision: str
) -> None:
    """Written under one strategy, read under another: fp32, and the very bits. Training goes on as it would have."""
    path = tmp_path / "a.ckpt"
    written = run(gloo_pair, strategy, precision, save=path)["routing"]
    if strategy != "dcp":
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(saved[name], tensor) for name, tensor in written.items())
    resumed = run(gloo_pair, other, precision, resume=path)
    if precision == "32-true" and strategy != "dcp":  # the optimizer's moments came along too, each to its parameter
        alone = run(gloo_pair, "auto", precision, resume=path)
        assert resumed["train"] == pytest.approx(alone["train"], abs=1e-5)
    read = resumed["start"]
    assert read.keys() == written.keys()
    assert any("threshold" in name for name in read)
    for name, tensor in written.items():
        assert read[name].dtype in (torch.float32, torch.int64)
        assert torch.equal(read[name], tensor), name
