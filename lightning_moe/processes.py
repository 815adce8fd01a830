"""Processes and signals of one machine, without torch: rank, interrupts, and which process dies with which."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def process_rank() -> int:
    """Return this process's rank in the training job, from the launcher's environment; 0 without a launcher."""
    for variable in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable])
    return 0


def drop_stale_ranks(environment: MutableMapping[str, str] = os.environ) -> None:
    """Drop ranks that a shell has from another program, and say so; Lightning would leave this process without a log.

    A launcher gives a rank together with ``WORLD_SIZE``. SLURM gives ``SLURM_PROCID`` together with ``SLURM_NTASKS``,
    which Lightning does not follow in a job that is named bash or interactive.
    """
    stale = {} if "WORLD_SIZE" in environment else {"RANK": "WORLD_SIZE", "LOCAL_RANK": "WORLD_SIZE"}
    if "SLURM_NTASKS" not in environment:
        stale["SLURM_PROCID"] = "SLURM_NTASKS"
    elif environment.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        stale["SLURM_PROCID"] = "srun in a batch job"
    for name, partner in stale.items():
        if environment.get(name, "0") != "0":
            print(f"warning: {name}={environment.pop(name)} without {partner} is ignored", file=sys.stderr)


def repair_streams() -> None:
    """Let this process print whatever it has to say: to a stream without UTF-8, or to one that is closed.

    Characters that a stream cannot encode are replaced. What is printed to a closed stream is lost, and no file that is
    opened later gets its number.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)  # it stays open, in the place of a closed one
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the program ends
        elif isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def usable_cores() -> int:
    """Return the number of cores that this process may use: its affinity, not what the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def dies_with(parent: int) -> Iterator[None]:
    """Let the kernel kill this process when its parent ends, whatever the reason, inside the block (Linux only).

    Args:
        parent: process id of the parent. If that process has ended already, this one is killed at once.
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
    """Return a function for the child, called before its program starts: the kernel kills it when this process dies."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request
            os._exit(1)

    return prepare


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise ``KeyboardInterrupt(SIGTERM)`` inside the block, so that it stops the program as Ctrl-C does.

    It works in the main thread only, where Python lets handlers be set.
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
    """Stop garbage collection inside the block: imports leave none, and the search takes a fifth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # there is no reason to look at these objects later either
        gc.enable()
