"""The tests of a GPU, rehearsed on the CPU as `make test-gpu` runs them, so that they do not rot between two GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def make(**environment: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "test-gpu", f"GPU_PYTHON={sys.executable}"]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_tests_of_a_gpu_pass_on_the_cpu() -> None:
    done = make(LIGHTNING_MOE_GPU_TESTS_ON="cpu")
    assert done.returncode == 0, done.stdout[-5000:]
    reasons = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert reasons
    assert all("rehearsal on the CPU: " in line for line in reasons)
