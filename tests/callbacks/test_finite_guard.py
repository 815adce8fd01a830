"""A run that has become NaN stops at once, says where it began, and keeps the last good checkpoint."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers.foreign_module import ForeignModule, global_batches, make_trainer, micro_batches
from helpers.gloo_pair import GlooPair
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moe.callbacks import FiniteGuard, RoutingStateUpdate
from lightning_moe.errors import TrainingDiverged
from lightning_moe.routing import ExpertThreshold, RoutingRule, TokenChoice


class Poison(pl.Callback):
    """Writes a value into a parameter before a micro-batch."""

    def __init__(self, batch_idx: int, name: str, value: float = torch.nan) -> None:
        self.batch_idx, self.name, self.value = batch_idx, name, value

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, i: int) -> None:
        if i == self.batch_idx:
            with torch.no_grad():
                pl_module.get_parameter(self.name)[0].fill_(self.value)


def train(
    folder: Path, poison: pl.Callback, accumulate: int = 1, rule: RoutingRule | None = None, steps: int = 6
) -> tuple[str, Path]:
    """The message of `TrainingDiverged`, and the last checkpoint."""
    checkpoint = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1)  # as a run has it
    trainer = make_trainer(
        [poison, FiniteGuard(), RoutingStateUpdate(), checkpoint], enable_checkpointing=True,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    module = ForeignModule(rule or ExpertThreshold())
    with pytest.raises(TrainingDiverged) as raised:
        trainer.fit(module, micro_batches(global_batches(steps), accumulate))
    return str(raised.value), folder / "last.ckpt"


def assert_good(path: Path, step: int) -> None:
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == step
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("block", "layer"), [(1, "layer_01"), (2, "layer_02")])
def test_step_and_layer_are_named_and_the_last_checkpoint_stays(
    tmp_path: Path, block: int, layer: str, accumulate: int
) -> None:
    poison = Poison(3 * accumulate + accumulate - 1, f"network.blocks.{block}.moe.router.weight")
    message, last = train(tmp_path, poison, accumulate)
    assert "not finite at step 3" in message
    assert f"router logits of {layer} first" in message
    assert str(tmp_path) in message
    assert_good(last, 3)


def test_the_lowest_bad_layer_is_the_one_that_is_named(tmp_path: Path) -> None:
    """What layer 1 emits makes layer 2 bad as well."""
    message, _ = train(tmp_path, Poison(2, "network.blocks.1.moe.router.weight"), rule=TokenChoice())
    assert "layer_01" in message
    assert "layer_02" not in message


def test_a_loss_that_breaks_after_the_routers_is_told_apart(tmp_path: Path) -> None:
    message, last = train(tmp_path, Poison(2, "network.head.weight"))
    assert "not finite at step 2" in message
    assert "not in the router logits" in message
    assert_good(last, 2)


def test_without_a_checkpoint_it_says_so(tmp_path: Path) -> None:
    message, last = train(tmp_path, Poison(0, "network.head.weight"))
    assert "no checkpoint had been written" in message
    assert not last.exists()


class PoisonGradient(pl.Callback):
    """Makes a gradient NaN though the loss is finite, as an overflow in a backward pass does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: pl.Trainer, pl_module: ForeignModule) -> None:
        if trainer.global_step == self.step:
            pl_module.layers()[0].experts.up.grad[0] = torch.nan


@pytest.mark.parametrize("steps", [6, 3], ids=["", "last_step"])
def test_a_step_to_weights_that_are_not_finite_is_not_saved(tmp_path: Path, steps: int) -> None:
    """The losses up to here were finite: only the weights tell."""
    _, last = train(tmp_path, PoisonGradient(2), steps=steps)
    assert_good(last, 2)


def test_a_first_checkpoint_that_was_refused_is_not_named_as_the_last_good_one(tmp_path: Path) -> None:
    message, last = train(tmp_path, PoisonGradient(0))
    assert "weights are not finite" in message
    assert "no checkpoint had been written" in message
    assert not last.exists()


def message_on_rank(rank: int) -> str:
    poison = [Poison(1, "network.blocks.2.moe.router.weight")] if rank == 1 else []
    trainer = make_trainer([*poison, FiniteGuard(), RoutingStateUpdate()], strategy="ddp", devices=2)
    with pytest.raises(TrainingDiverged) as raised:
        trainer.fit(ForeignModule(ExpertThreshold()), micro_batches(global_batches(3), 1, rank, 2))
    return str(raised.value)


def test_all_ranks_stop_where_one_has_broken(gloo_pair: GlooPair) -> None:
    first, second = gloo_pair.run(message_on_rank, [(0,), (1,)])
    assert first == second
    assert "not finite at step 1: the router logits of layer_02 first" in first


def test_a_good_run_is_left_alone(tmp_path: Path) -> None:
    module, plain = ForeignModule(ExpertThreshold()), ForeignModule(ExpertThreshold())
    for trained, guards in ((module, [FiniteGuard()]), (plain, [])):
        make_trainer([*guards, RoutingStateUpdate()]).fit(trained, micro_batches(global_batches(3)))
    assert module.losses == plain.losses
