"""The automatic switch: what it measures, when it comes, and that splits and resumption do not move it."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from helpers.foreign_module import ForeignModule, MemoryLogger, global_batches, make_trainer, micro_batches
from helpers.gloo_pair import GlooPair

from lightning_moe.callbacks import RoutingStateUpdate, ThresholdWarmup
from lightning_moe.errors import UserError
from lightning_moe.routing import ExpertThreshold, TokenChoice

WINDOW = 20
#: no capacity and experts that choose within sequences: nothing but the warm-up itself depends on the split
RULE = ExpertThreshold(ema_decay=0.9, capacity_factor=None, warmup_pool="sequence")


class WouldBeLoad(pl.Callback):
    """Tokens above the stored threshold, fp64 [layers, E], of every optimizer step of an unsplit run."""

    def __init__(self) -> None:
        self.steps: list[np.ndarray] = []
        self.tokens = 0

    def on_after_backward(self, trainer: pl.Trainer, pl_module: ForeignModule) -> None:
        above = []
        for layer in pl_module.layers():
            logits, threshold = layer.record.logits.numpy().reshape(-1, 4), layer.state["threshold"].numpy()
            above.append([sum(row[i] > threshold[i] for row in logits) for i in range(4)])
        self.tokens = len(logits)
        self.steps.append(np.array(above, dtype=np.float64))

    def deviations(self) -> list[float]:
        """Of each full window."""
        values = []
        for start in range(0, len(self.steps) - WINDOW + 1, WINDOW):
            load = sum(self.steps[start : start + WINDOW]) / (WINDOW * self.tokens / 4)
            values.append(np.abs(load - 1).mean())
        return values


def train(
    warmup: ThresholdWarmup,
    steps: int,
    *callbacks: pl.Callback,
    strategy: str = "auto",
    rank: int = 0,
    accumulate: int = 1,
    learning_rate: float = 3e-2,
    ckpt_path: Path | None = None,
    save_to: Path | None = None,
    **options: Any,
) -> tuple[int | None, float | None]:
    """(step of the switch, last deviation) after ``steps`` of an 80-step run."""
    module = ForeignModule(options.pop("rule", RULE), learning_rate)
    world_size = 1 if strategy == "auto" else 2
    trainer = make_trainer(
        [warmup, *callbacks, RoutingStateUpdate()],
        strategy=strategy,
        devices=world_size,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        **options,
    )
    batches = global_batches(80)
    if ckpt_path is not None:  # of 30 steps: the loader starts with what comes next
        batches = batches[30:] + batches[:30]
    trainer.fit(module, micro_batches(batches, accumulate, rank, world_size), ckpt_path=ckpt_path, weights_only=True)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    return warmup.switched_at_step, warmup.deviation


def unbounded(tolerance: float = 1e-6, min_steps: int = 0) -> ThresholdWarmup:
    return ThresholdWarmup(auto=True, tolerance=tolerance, min_steps=min_steps)


def test_the_switch_comes_after_the_first_window_within_tolerance() -> None:
    reference = WouldBeLoad()
    assert train(unbounded(), 80, reference, learning_rate=0.3)[0] is None  # never that good
    deviations = reference.deviations()
    assert len(deviations) == 4
    assert deviations[0] > 2 * deviations[-1]  # logits grow fast at first
    for window in range(3):
        tolerance = deviations[window] + 1e-9
        first = next(i for i, value in enumerate(deviations) if value <= tolerance)
        switched, deviation = train(unbounded(tolerance), 80, learning_rate=0.3)
        assert switched == (first + 1) * WINDOW
        assert deviation == pytest.approx(deviations[first], rel=1e-12)


def test_a_router_that_does_not_move_settles_in_the_first_window() -> None:
    """The same batches' sampling noise alone: within a tenth."""
    assert train(unbounded(0.1), 30, learning_rate=0.0)[0] == WINDOW


def test_earliest_and_latest_step() -> None:
    assert train(unbounded(tolerance=100.0, min_steps=30), 50)[0] == 30
    assert train(ThresholdWarmup(steps=33, auto=True, tolerance=1e-6), 50)[0] == 33
    assert train(ThresholdWarmup(steps=None, tokens=33 * 8 * 16, auto=True, tolerance=1e-6), 50)[0] == 33
    assert train(ThresholdWarmup(steps=33, auto=True, tolerance=100.0, min_steps=0), 50)[0] == WINDOW


def test_without_auto_nothing_is_measured() -> None:
    assert train(ThresholdWarmup(steps=45), 60) == (45, None)


def test_rules_without_a_warmup_are_left_alone() -> None:
    assert train(unbounded(100.0), 30, rule=TokenChoice()) == (None, None)


def split_run(strategy: str, rank: int, accumulate: int, tolerance: float) -> tuple[int | None, float | None]:
    return train(unbounded(tolerance), 50, strategy=strategy, rank=rank, accumulate=accumulate)


def test_the_decision_is_the_same_for_all_splits(gloo_pair: GlooPair) -> None:
    _, deviation = train(unbounded(), 50)
    assert deviation is not None
    tolerance = deviation + 1e-4  # reached at step 40
    expected = train(unbounded(tolerance), 50)
    assert expected[0] == 2 * WINDOW
    results = [train(unbounded(tolerance), 50, accumulate=2)]
    for accumulate in (1, 2):
        results += gloo_pair.run(split_run, [("ddp", rank, accumulate, tolerance) for rank in (0, 1)])
    for switched, value in results:
        assert switched == expected[0]
        assert value == pytest.approx(expected[1], abs=1e-4)  # a logit within rounding of its threshold may move


def test_a_run_resumed_within_a_window_switches_where_the_whole_one_does(tmp_path: Path) -> None:
    whole = train(unbounded(), 50)
    train(unbounded(), 30, save_to=tmp_path / "half.ckpt")
    resumed = train(unbounded(), 50, ckpt_path=tmp_path / "half.ckpt")
    assert resumed == whole
    assert whole[1] is not None
    assert train(unbounded(whole[1]), 50, ckpt_path=tmp_path / "half.ckpt")[0] == 2 * WINDOW


def test_the_measured_deviation_is_logged() -> None:
    logger = MemoryLogger()
    _, deviation = train(unbounded(), 45, logger=logger, log_every_n_steps=5)
    logged = [
        values["routing/warmup_deviation"] for values in logger.logged.values() if "routing/warmup_deviation" in values
    ]
    assert len(set(logged)) == 2  # two windows
    assert logged[-1] == pytest.approx(deviation, rel=1e-6)


@pytest.mark.parametrize("options", [{"tolerance": 0.0}, {"tolerance": -1.0}, {"min_steps": -1}])
def test_impossible_orders_are_refused(options: dict[str, Any]) -> None:
    [(name, value)] = options.items()
    with pytest.raises(UserError, match=rf"threshold_warmup\.{name}={value}"):
        ThresholdWarmup(auto=True, **options)
