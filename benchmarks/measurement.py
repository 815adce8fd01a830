"""Measurements: time, interleaved so that all cases meet the same machine; memory; and waits of the host."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from lightning_moe.waits import as_if_reading_waited

#: operations whose result the host waits for
_WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
#: calls of CUDA's runtime and driver that start work on the device
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
#: those that call them on the CPU only
_CPU_KERNELS = frozenset(("aten::_grouped_mm", "aten::_fused_adamw_"))


@dataclass(frozen=True)
class Measurement:
    """One case of a comparison.

    Args:
        value: median over the rounds.
        unit: unit of the value: ``s``, ``bytes`` or ``waits``.
        ratio: median of this case's value over the first case's of the same round; `None` if that is 0.
        low: first quartile of these ratios.
        high: third quartile.
    """

    value: float
    unit: str
    ratio: float | None
    low: float | None
    high: float | None


WARMUP_ROUNDS = 2  # that do not count


def interleaved(cases: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Measurement]:
    """Time each case ``rounds`` times, in turn; each round begins with another one, so that none is always the first.

    Args:
        cases: functions to time, by name; the others are divided by the first.
        rounds: number of rounds, at least 2.
        device: device to wait for around each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    gc.disable()
    gc.freeze()  # collections then look at new objects only
    try:
        names = list(cases)
        for index in range(WARMUP_ROUNDS + rounds):
            for name in (*names[index % len(names) :], *names[: index % len(names)]):
                run = cases[name]
                wait(device)
                started = time.perf_counter()
                run()
                wait(device)
                if index >= WARMUP_ROUNDS:
                    seconds[name].append(time.perf_counter() - started)
            gc.collect()
    finally:
        gc.unfreeze()
        gc.enable()
    base = next(iter(seconds.values()))
    result = {}
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles([own / other for own, other in zip(times, base, strict=True)], n=4)
        result[name] = Measurement(statistics.median(times), "s", middle, low, high)
    return result


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run: Callable[[], object], device: torch.device, at_end: bool = False) -> int:
    """Return the most bytes of tensors during ``run``, or the bytes ``at_end``, above those before it.

    On the CPU the profiler shows every allocation and release of torch's allocator, also inside of operations, but not
    the scratch memory of the matrix libraries. On CUDA it is the caching allocator's peak.
    """
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        wait(device)
        after = torch.cuda.memory_allocated(device) if at_end else torch.cuda.max_memory_allocated(device)
        return after - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = held = 0
    for _, nbytes in changes:
        held += nbytes
        peak = max(peak, held)
    return held if at_end else peak


def require_close(found: Tensor, expected: Tensor, precision: str, name: str) -> None:
    """Raise an AssertionError if two results differ by more than the precision's rounding, or are no numbers."""
    error = float((expected.float() - found.float()).abs().max() / expected.float().abs().max())
    if not error <= (1e-4 if precision == "32-true" else 0.05):  # NaN, too
        raise AssertionError(f"{name} computes something else: largest relative difference {error:.2g}")


def host_waits(run: Callable[[], object], device: torch.device) -> int:
    """Return how often the host waits for the device during ``run``.

    On CUDA it counts torch's own warnings of synchronising calls. The CPU, which never waits, does what it would do if
    it did (`waits`), and the operations that would wait are counted.
    """
    if device.type == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)
    with as_if_reading_waited(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return sum(event.name in _WAITING and not _CPU_KERNELS.intersection(_callers(event)) for event in profiler.events())


def launches(run: Callable[[], object], device: torch.device) -> int:
    """Return how many kernels and graphs the host launches during ``run``.

    On the CPU, which launches nothing, it is the number of torch's operations that call no further ones.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        run()
        wait(device)
    if on_gpu:
        return sum(any(name in event.name for name in _LAUNCHES) for event in profiler.events())
    return sum(event.name.startswith("aten::") and not event.cpu_children for event in profiler.events())


def _callers(event: FunctionEvent) -> Iterator[str]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name
