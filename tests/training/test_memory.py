"""Freed memory is used again: in a process of its own, because it changes the process."""

import os
import subprocess
import sys

PROGRAM = """
import resource, sys
from lightning_moe.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory())
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(80_000_000)  # some 20,000 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], env=clean | environment, capture_output=True, text=True, check=True
    ).stdout.split()


def test_pages_are_touched_once() -> None:
    assert int(faults("default")[0]) > 100_000
    done, count = faults("keep")
    assert done == "True"
    assert int(count) < 50_000


def test_the_users_own_settings_stay() -> None:
    done, count = faults("keep", MALLOC_TOP_PAD_="131072")
    assert done == "False"
    assert int(count) > 100_000
