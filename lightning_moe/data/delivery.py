"""How batches reach the training loop: in pinned memory, one ahead, and with a clock for the time waited."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

Batch = dict[str, torch.Tensor]


class Delivery:
    """Batches of an iterable, as a device wants them.

    Lightning copies pinned batches to a GPU without waiting (``non_blocking``).

    Args:
        device: device that the batches will go to. For a GPU, batches are moved to pinned memory.
        ahead: whether a thread reads the next batch while the present one is used, if the device is a GPU. On the CPU
            it would only take time from training.
    """

    def __init__(self, device: torch.device, ahead: bool) -> None:
        self.pinned = device.type == "cuda"
        self._ahead, self._device = ahead and self.pinned, device
        self.seconds_waited = 0.0

    def deliver(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and add the time that each takes to come to ``seconds_waited``."""
        source = iter(batches)
        if self.pinned:
            source = (_pin(batch) for batch in source)
        if self._ahead:
            source = one_ahead(source, self._device)
        while True:
            started = time.perf_counter()
            batch = next(source, None)
            self.seconds_waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch


def one_ahead(batches: Iterator[Batch], device: torch.device | None = None) -> Iterator[Batch]:
    """Yield the batches while a thread reads the next one; its error is raised where its batch would come.

    Args:
        batches: batches to read.
        device: GPU whose context the thread uses to pin memory; by default it uses none.
    """
    begin = None if device is None else lambda: torch.cuda.set_device(device)
    with ThreadPoolExecutor(1, thread_name_prefix="next-batch", initializer=begin) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def _pin(batch: Batch) -> Batch:
    return {name: tensor.pin_memory() for name, tensor in batch.items()}
