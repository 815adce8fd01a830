"""Interleaved timing: every round runs each case once, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """One case of a comparison.

    Args:
        seconds: median time of a run.
        ratio: median over the rounds of this case's time over the baseline's of the same round.
        low: first quartile of these ratios.
        high: third quartile.
    """

    seconds: float
    ratio: float
    low: float
    high: float


def interleaved(
    cases: Mapping[str, Callable[[], object]], baseline: str, rounds: int, device: torch.device, warmup: int = 2
) -> dict[str, Timing]:
    """Time each case ``rounds`` times, in turn.

    Args:
        cases: what to run, by name.
        baseline: the case that the others are divided by.
        rounds: at least 2.
        device: waited for around each run.
        warmup: rounds that do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    gc.disable()
    try:
        for index in range(warmup + rounds):
            for name, run in cases.items():
                wait(device)
                started = time.perf_counter()
                run()
                wait(device)
                if index >= warmup:
                    seconds[name].append(time.perf_counter() - started)
            gc.collect()
    finally:
        gc.enable()
    result = {}
    for name, times in seconds.items():
        ratios = [own / base for own, base in zip(times, seconds[baseline], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] = Timing(statistics.median(times), middle, low, high)
    return result


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
