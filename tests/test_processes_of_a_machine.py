"""What this process may use of its machine."""

import os
import subprocess
import sys

import pytest

from lightning_moe.cli.prepare import OPTIONS
from lightning_moe.processes import usable_cores

PINNED = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from lightning_moe.processes import "


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_only_the_cores_that_the_process_may_use_count() -> None:
    assert usable_cores() == len(os.sched_getaffinity(0))
    code = f"{PINNED}usable_cores; print(usable_cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    assert "one per usable core" in OPTIONS["--workers N"]
