"""Tokens per second, FLOP/s on active parameters, and model FLOPs utilisation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_moe.callbacks.clock import LoggingClock
from lightning_moe.devices import device_that_prints


class Throughput(pl.Callback):
    """Logs ``throughput/tokens_per_second`` (all ranks, time outside validation), ``throughput/flops_per_second``,
    ``throughput/mfu`` and ``throughput/data_wait_share``.

    Tokens are the elements of ``batch["input_ids"]``; in a batch of another form, those of its first integer tensor.
    FLOPs are those of *active* parameters at the target rate. The module offers them as ``flops_per_token`` (forward +
    backward); without that attribute only tokens are counted. ``mfu`` is logged if `devices` knows the peak of the
    device. The share of the time that this process waits for batches is logged if the training loader counts it, as
    those of `TextDataModule` do (``seconds_waited``). The first step is left out (allocation, compilation).
    """

    def __init__(self) -> None:
        self.tokens_per_second: float | None = None  # over the whole run so far
        self._seconds = self._interval_seconds = 0.0
        self._tokens = self._interval_tokens = 0
        self._last: float | None = None
        self._waited = 0.0  # for data, until the present interval began
        self._clock = LoggingClock()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.start(trainer)
        self._last = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        logging = self._clock.is_due(trainer)
        if logging and pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self._interval_seconds += now - self._last
            self._interval_tokens += _num_tokens(batch) * trainer.world_size
        else:
            self._waited = _seconds_waited(trainer) or 0.0
        self._last = now
        if logging and self._interval_seconds > 0 and self._interval_tokens:
            self._log(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._last is not None:
            self._last = time.perf_counter()  # a new span starts after the validation

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close_interval()

    def _close_interval(self) -> float:
        rate = self._interval_tokens / self._interval_seconds if self._interval_seconds else 0.0
        self._seconds += self._interval_seconds
        self._tokens += self._interval_tokens
        self._interval_seconds, self._interval_tokens = 0.0, 0
        self.tokens_per_second = self._tokens / self._seconds if self._seconds else None
        return rate

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seconds, waited = self._interval_seconds, _seconds_waited(trainer)
        rate = self._close_interval()
        values = {"throughput/tokens_per_second": rate}
        if waited is not None:
            values["throughput/data_wait_share"] = (waited - self._waited) / seconds
            self._waited = waited
        flops_per_token = getattr(pl_module, "flops_per_token", None)
        if flops_per_token is not None:
            values["throughput/flops_per_second"] = rate * flops_per_token
            peak = _peak_flops(trainer, pl_module.device)
            if peak is not None:
                values["throughput/mfu"] = rate * flops_per_token / (peak * trainer.world_size)
        pl_module.log_dict(values)


def _seconds_waited(trainer: pl.Trainer) -> float | None:
    """Return the seconds that training has waited for batches so far; `None` if the loader does not count them."""
    return getattr(trainer.train_dataloader, "seconds_waited", None)


def _num_tokens(batch: Any) -> int:
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return int(batch["input_ids"].numel())
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append)
    return next((tensor.numel() for tensor in tensors if not tensor.is_floating_point()), 0)


def _peak_flops(trainer: pl.Trainer, device: torch.device) -> float | None:
    """Return the peak FLOP/s of one device in the precision of the matmuls, or `None` if it is unknown."""
    known = device_that_prints(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if known is None else known.peak(str(trainer.precision))
