"""Signals that ask a run to stop: remembered when they come, obeyed when all ranks agree."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
import torch.distributed as dist

#: signal → exit code of the stopped run
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}


class StopSignals:
    """SIGTERM (pre-emption), SIGUSR1 (SLURM's warning before the time limit) and Ctrl-C, while training runs.

    The handler only remembers the signal. Ranks are at different places when it comes, so a collective in the handler
    would answer another rank's. A second Ctrl-C is a plain ``KeyboardInterrupt``.
    """

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[int, Any] = {}
        self._group: dist.ProcessGroup | None = None

    def install(self) -> None:
        """Replace the present handlers. Collective."""
        self._received = 0
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._before.setdefault(number, signal.signal(number, self._remember))
        if dist.is_available() and dist.is_initialized() and self._group is None:
            self._group = dist.new_group(backend="gloo")  # so that a step of an accelerator does not wait for this

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agreed(self) -> int:
        """Return the signal that any rank has got so far, the same on all ranks; 0 for none. Collective."""
        if self._group is None or dist.get_world_size() == 1:
            return self._received
        received = torch.tensor(self._received)
        dist.all_reduce(received, dist.ReduceOp.MAX, self._group)
        return int(received)

    def _remember(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number


def leave_sigterm_to_the_system() -> None:
    """Let SIGTERM end the process at once if there is nothing to save; Lightning's handler would go on."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
