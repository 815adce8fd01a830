"""Processes and signals of one machine, without torch: rank, interrupts, and who dies with whom."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def process_rank() -> int:
    """This process's number among those of the training job, from the launcher's environment; 0 where there is none."""
    for variable in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable])
    return 0


@contextmanager
def dies_with(parent: int) -> Iterator[None]:
    """Inside the block, the kernel kills this process when its parent ends, however that ends (Linux only).

    Args:
        parent: process id of the parent. If that process is gone already, this one is killed at once.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    set_option = ctypes.CDLL(None).prctl
    set_option(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        yield
    finally:
        set_option(_PR_SET_PDEATHSIG, 0)


def die_with_parent() -> Callable[[], None]:
    """For the child, before its program starts: have the kernel kill it when this process dies."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request
            os._exit(1)

    return prepare


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM raises ``KeyboardInterrupt(SIGTERM)``, so that what runs is stopped as by Ctrl-C.

    Only in the main thread, where Python lets handlers be set.
    """
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


@contextmanager
def garbage_kept() -> Iterator[None]:
    """For imports: they leave no garbage behind, and looking for it takes a fifth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor is there reason to look at these objects later
        gc.enable()
