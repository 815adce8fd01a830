"""When the host waits for a device.

Work on a GPU is queued: the host goes on before it is done. Reading a number from the GPU ends that, because the host
then waits for all the work before it. Code that trains asks here, and reads nothing where that would be a wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_pretended = False


def reading_waits(device: torch.device) -> bool:
    """Return whether reading a number from ``device`` makes the host wait."""
    return _pretended or device.type != "cpu"


@contextmanager
def as_if_reading_waited() -> Iterator[None]:
    """Let the CPU do inside the block what a GPU does, for tests and for counting waits without a GPU."""
    global _pretended
    before, _pretended = _pretended, True
    try:
        yield
    finally:
        _pretended = before
