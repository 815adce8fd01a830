"""Batches arrive in their order, one ahead of their use for a GPU, and the time spent waiting for them is counted."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from small_corpus import Witness, datamodule, trainer

from lightning_moe.callbacks import Throughput
from lightning_moe.data import delivery
from lightning_moe.data.delivery import Batch, Delivery, one_ahead
from lightning_moe.data.windows import TokenWindows

GPU = torch.device("cuda", 0)


def batches(count: int, read: list[int], pause: float = 0.0) -> Iterator[Batch]:
    for number in range(count):
        time.sleep(pause)
        read.append(number)
        yield {"input_ids": torch.tensor([[number]])}


def test_the_next_batch_is_read_while_the_present_one_is_used() -> None:
    read: list[int] = []
    taken = one_ahead(batches(3, read))
    for number, batch in enumerate(taken):
        assert int(batch["input_ids"]) == number
        deadline = time.monotonic() + 60
        while len(read) < min(number + 2, 3) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert read == list(range(min(number + 2, 3)))  # one ahead, and no more
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("next-batch")]


def test_an_error_comes_where_its_batch_would_and_the_thread_ends() -> None:
    def broken() -> Iterator[Batch]:
        yield from batches(2, [])
        raise OSError("the file is gone")

    taken = one_ahead(broken())
    assert [int(next(taken)["input_ids"]), int(next(taken)["input_ids"])] == [0, 1]
    with pytest.raises(OSError, match="the file is gone"):
        next(taken)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("next-batch")]


@pytest.mark.parametrize("ahead", [False, True])
def test_batches_for_a_gpu_are_pinned(monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    """Pinning needs a GPU, so it is replaced here; tests/gpu asks the tensors."""
    pinned: list[int] = []
    monkeypatch.setattr(delivery, "_pin", lambda batch: pinned.append(int(batch["input_ids"])) or batch)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    delivered = Delivery(GPU, ahead).deliver(batches(3, []))
    assert [int(batch["input_ids"]) for batch in delivered] == pinned == [0, 1, 2]
    assert len(list(Delivery(torch.device("cpu"), ahead).deliver(batches(3, [])))) == 3
    assert len(pinned) == 3


def test_the_time_waited_is_that_of_reading() -> None:
    slow = Delivery(torch.device("cpu"), ahead=True)
    for _ in slow.deliver(batches(3, [], pause=0.05)):
        time.sleep(0.2)
    assert 0.15 <= slow.seconds_waited < 0.6


class Logged(pl.Callback):
    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if "throughput/data_wait_share" in trainer.callback_metrics:
            self.shares.append(float(trainer.callback_metrics["throughput/data_wait_share"]))


def test_the_share_of_waiting_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading takes a quarter of a second of a clock that the test holds, and the rest of a step three quarters."""
    now = 0.0

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Slow(Witness):
        def training_step(self, *args: object) -> torch.Tensor:
            pass_time(0.75)
            return super().training_step(*args)

    monkeypatch.setattr("time.perf_counter", lambda: now)
    read = TokenWindows.__getitem__
    monkeypatch.setattr(
        TokenWindows, "__getitem__", lambda windows, indices: (pass_time(0.25), read(windows, indices))[1]
    )
    logged = Logged()
    options = {"max_steps": 5, "limit_val_batches": 0, "log_every_n_steps": 1, "callbacks": [Throughput(), logged]}
    trainer(tmp_path, **options).fit(Slow(), datamodule=datamodule(tmp_path))
    assert logged.shares[-1] == pytest.approx(0.25)
    assert len(set(logged.shares)) == 1
