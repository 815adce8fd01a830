"""Freed memory, kept for the next step."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, from glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let the C library reuse freed blocks of any size, in this process, instead of giving them back to the system.

    glibc maps each block above 32 MB anew, and the kernel clears it page by page when it is first touched. A training
    step on the CPU frees and allocates the same large tensors again and again, which took up to a quarter of its time
    (docs/performance.md). The price: memory stays with the process until it ends.

    Nothing is changed where the environment already sets malloc's behaviour (``MALLOC_…``, ``GLIBC_TUNABLES``), nor by
    other C libraries.

    Returns:
        Whether it was done.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
