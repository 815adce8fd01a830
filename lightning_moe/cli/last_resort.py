"""The end of a command with an error that nothing else explains: one line, and the traceback in a file."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from contextlib import suppress

from lightning_moe.errors import MemoryRanOut
from lightning_moe.processes import process_rank
from lightning_moe.redaction import redact

UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h
OUT_OF_MEMORY = 6
_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "Unable to allocate", "bad_alloc")


def explain_unexpected(error: Exception) -> int:
    """Print one line about an error, keep its traceback in a file that only this user can read; return the exit code.

    Passwords of URLs are taken out of both.

    Args:
        error: error that left a command.

    Returns:
        6 if memory ran out, else 70.
    """
    rank = process_rank()
    prefix = f"[rank {rank}] " if rank else ""
    lines = redact(str(error)).splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0][:300]}".removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__)
    if frames:
        reason += f" (in {frames[-1].filename}:{frames[-1].lineno})"
    place = _save_traceback(error)
    if isinstance(error, MemoryRanOut):  # its message is complete
        print(f"{prefix}error: {' '.join(redact(str(error)).split())}. {place}", file=sys.stderr)
        return OUT_OF_MEMORY
    if is_out_of_memory(error):
        print(f"{prefix}error: memory ran out: {reason}; `plan` tells what a run takes. {place}", file=sys.stderr)
        return OUT_OF_MEMORY
    print(f"{prefix}error: unexpected {reason}. {place}", file=sys.stderr)
    return UNEXPECTED


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, torch or numpy says that memory ran out."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


def _save_traceback(error: Exception) -> str:
    """Return a sentence that says where the traceback is."""
    text = redact("".join(traceback.format_exception(error)))
    with suppress(OSError):
        descriptor, path = tempfile.mkstemp(prefix="lightning_moe-traceback-", suffix=".txt")  # mode 0600
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        return f"Its traceback is in {path}"
    return "LIGHTNING_MOE_DEBUG=1 shows its traceback"
