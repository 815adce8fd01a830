"""When the host waits for a device.

Work on a GPU is queued: the host goes on before it is done. Reading a number from the GPU ends that, because the host
then waits for all the work before it. Code that trains asks here, and reads nothing where that would be a wait.
"""

from __future__ import annotations

import torch


def reading_waits(device: torch.device) -> bool:
    """Return whether reading a number from ``device`` makes the host wait."""
    return device.type != "cpu"
