"""The switch from expert choice to thresholds: when, once, for good; evaluation is causal throughout."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers.foreign_module import LENGTH, ForeignModule, global_batches, make_trainer, micro_batches
from helpers.gloo_pair import GlooPair

from lightning_moe.callbacks import RoutingStateUpdate, ThresholdWarmup
from lightning_moe.errors import UserError
from lightning_moe.routing import ExpertChoice, ExpertThreshold, Phase, RoutingRule, TokenChoice

TOKENS_PER_STEP = 8 * LENGTH
W, T = Phase.WARMUP, Phase.TRAIN


class Phases(pl.Callback):
    """The phase of each micro-batch, and whether each validation batch was routed by thresholds."""

    def __init__(self) -> None:
        self.train: list[Phase] = []
        self.causal: list[bool] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: ForeignModule, *args: object) -> None:
        phases = {layer.phase for layer in pl_module.layers()}
        assert len(phases) == 1
        self.train += phases

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: ForeignModule, *args: object) -> None:
        for layer in pl_module.layers():
            above = layer.record.logits > layer.state["threshold"]
            self.causal.append(torch.equal(layer.record.selection.mask, above))


def phases(warmup: ThresholdWarmup, rule: RoutingRule | None = None, steps: int = 5, accumulate: int = 1) -> Phases:
    recorder = Phases()
    callbacks = [warmup, RoutingStateUpdate(), recorder]
    trainer = make_trainer(callbacks, accumulate_grad_batches=accumulate, val_check_interval=1, limit_val_batches=1)
    module = ForeignModule(rule or ExpertThreshold(ema_decay=0.5))
    val = micro_batches(global_batches(1)) if rule is None else None
    trainer.fit(module, micro_batches(global_batches(steps), accumulate), val)
    return recorder


@pytest.mark.parametrize(
    ("options", "accumulate", "expected"),
    [
        ({}, 1, [T, T, T, T, T]),
        ({"steps": 3}, 1, [W, W, W, T, T]),
        ({"steps": 2}, 2, [W] * 4 + [T] * 6),  # all micro-batches of a step are in one phase
        ({"steps": None, "tokens": 2 * TOKENS_PER_STEP}, 1, [W, W, T, T, T]),
        ({"steps": 0, "tokens": 2 * TOKENS_PER_STEP + 1}, 1, [W, W, W, T, T]),
        ({"steps": None, "tokens": 2 * TOKENS_PER_STEP - 1}, 4, [W] * 8 + [T] * 12),
    ],
)
def test_the_switch_comes_when_it_was_ordered(options: dict[str, int], accumulate: int, expected: list[Phase]) -> None:
    recorder = phases(ThresholdWarmup(**options), accumulate=accumulate)
    assert recorder.train == expected
    assert recorder.causal
    assert all(recorder.causal)  # validation used thresholds in both phases


def phases_on_rank(rank: int, accumulate: int) -> list[Phase]:
    recorder, warmup = Phases(), ThresholdWarmup(tokens=2 * TOKENS_PER_STEP)
    trainer = make_trainer(
        [warmup, RoutingStateUpdate(), recorder], accumulate_grad_batches=accumulate, strategy="ddp", devices=2
    )
    trainer.fit(ForeignModule(ExpertThreshold()), micro_batches(global_batches(4), accumulate, rank, 2))
    return recorder.train


@pytest.mark.parametrize("accumulate", [1, 2])
def test_tokens_are_those_of_all_ranks(gloo_pair: GlooPair, accumulate: int) -> None:
    expected = [W] * 2 * accumulate + [T] * 2 * accumulate
    assert gloo_pair.run(phases_on_rank, [(0, accumulate), (1, accumulate)]) == [expected, expected]


@pytest.mark.parametrize("rule", [ExpertChoice(), TokenChoice()], ids=["EC", "TC"])
def test_rules_without_a_warmup_never_have_one(rule: RoutingRule) -> None:
    assert phases(ThresholdWarmup(steps=100), rule, steps=2).train == [T, T]


def test_the_switch_is_in_the_checkpoint_and_never_goes_back(tmp_path: Path) -> None:
    """Resumed with a longer warm-up, a run that had switched stays switched; one that had not goes on counting."""

    def run(warmup: ThresholdWarmup, steps: int, ckpt_path: Path | None = None) -> tuple[pl.Trainer, Phases]:
        recorder = Phases()
        trainer = make_trainer([warmup, RoutingStateUpdate(), recorder], max_steps=steps, max_epochs=-1)
        module = ForeignModule(ExpertThreshold())
        trainer.fit(module, micro_batches(global_batches(8)), ckpt_path=ckpt_path, weights_only=True)
        return trainer, recorder

    switched, counting = tmp_path / "switched.ckpt", tmp_path / "counting.ckpt"
    trainer, _ = run(ThresholdWarmup(steps=1), 2)
    trainer.save_checkpoint(switched)
    trainer, _ = run(ThresholdWarmup(tokens=4 * TOKENS_PER_STEP), 2)
    trainer.save_checkpoint(counting)

    assert run(ThresholdWarmup(steps=100), 5, switched)[1].train == [T] * 3
    warmup = ThresholdWarmup(tokens=4 * TOKENS_PER_STEP)
    assert run(warmup, 6, counting)[1].train == [W, W, T, T]
    assert warmup.switched_at_step == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5, "tokens": 7}, r"threshold_warmup\.steps=5 and threshold_warmup\.tokens=7"),
        ({"steps": -1}, r"threshold_warmup\.steps is -1"),
        ({"tokens": -2}, r"threshold_warmup\.tokens=-2"),
    ],
)
def test_impossible_orders_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ThresholdWarmup(**options)
