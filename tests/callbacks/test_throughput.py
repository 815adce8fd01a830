"""Tokens per second are tokens over seconds, counted on a clock that the test holds."""

import lightning.pytorch as pl
import pytest
import torch
from helpers.foreign_module import LENGTH, ForeignModule, MemoryLogger, global_batches, make_trainer, micro_batches
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moe.callbacks import FiniteGuard, LoadBalance, RoutingStateUpdate, ThresholdWarmup, Throughput
from lightning_moe.callbacks.throughput import _peak_flops
from lightning_moe.routing import ExpertThreshold, TokenChoice


class Clock(pl.Callback):
    """Time stands still but for a quarter of a second per micro-batch and an hour per validation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def on_train_batch_start(self, *args: object) -> None:
        self.now += 0.25

    def on_validation_start(self, *args: object) -> None:
        self.now += 3600.0


@pytest.mark.parametrize(("accumulate", "log_every_n_steps"), [(1, 1), (2, 1), (4, 2)])
def test_rate_is_tokens_over_seconds_without_validation(
    monkeypatch: pytest.MonkeyPatch, accumulate: int, log_every_n_steps: int
) -> None:
    module, logger, throughput = ForeignModule(TokenChoice()), MemoryLogger(), Throughput()
    module.flops_per_token = 1000
    trainer = make_trainer(
        [Clock(monkeypatch), throughput], logger=logger, accumulate_grad_batches=accumulate,
        log_every_n_steps=log_every_n_steps, val_check_interval=accumulate, num_sanity_val_steps=1,
    )  # fmt: skip
    trainer.fit(module, micro_batches(global_batches(4), accumulate), micro_batches(global_batches(1)))
    rate = 8 * LENGTH / accumulate / 0.25
    logged = [values for values in logger.logged.values() if "throughput/tokens_per_second" in values]
    assert logged
    for values in logged:
        assert values["throughput/tokens_per_second"] == pytest.approx(rate)
        assert values["throughput/flops_per_second"] == pytest.approx(1000 * rate)
        assert "throughput/mfu" not in values  # the peak of a CPU is not known
    assert throughput.tokens_per_second == pytest.approx(rate)


@pytest.mark.parametrize(
    ("name", "precision", "peak"), [("NVIDIA H200", "bf16-mixed", 989.4e12), ("Odd", "32-true", None)]
)
def test_the_peak_is_that_of_our_table_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, name: str, precision: str, peak: float | None
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    trainer = make_trainer([], logger=MemoryLogger(), precision=precision)
    recwarn.clear()
    assert _peak_flops(trainer, torch.device("cuda", 0)) == peak
    assert _peak_flops(trainer, torch.device("cpu")) is None
    assert not recwarn.list


def test_a_second_fit_does_not_count_the_time_between(monkeypatch: pytest.MonkeyPatch) -> None:
    throughput, clock = Throughput(), Clock(monkeypatch)
    for _ in range(2):
        trainer = make_trainer([clock, throughput], logger=MemoryLogger(), log_every_n_steps=1)
        trainer.fit(ForeignModule(TokenChoice()), micro_batches(global_batches(3)))
        clock.now += 3600.0
    assert throughput.tokens_per_second == pytest.approx(8 * LENGTH / 0.25)


def test_no_callback_asks_for_a_certain_form_of_batch() -> None:
    """Batches of a foreign module may be tuples."""

    class Tuples(ForeignModule):
        def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return super().loss({"input_ids": batch[0], "labels": batch[1]})

    logger, throughput = MemoryLogger(), Throughput()
    callbacks = [ThresholdWarmup(), FiniteGuard(), RoutingStateUpdate(), LoadBalance(), throughput]
    batches = [(batch["input_ids"], batch["labels"]) for batch in global_batches(3)]
    loader, val = DataLoader(batches, batch_size=None), DataLoader(batches[:1], batch_size=None)
    make_trainer(callbacks, logger=logger, log_every_n_steps=1).fit(Tuples(ExpertThreshold()), loader, val)
    assert "routing/max_load" in logger.logged[2]
    assert logger.logged[2]["throughput/tokens_per_second"] > 0
    assert all(torch.tensor(list(values.values())).isfinite().all() for values in logger.logged.values())
