"""The pool of runs: what an exit means, how many run at the same time, and that nothing outlives it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_sweep import processes_of, wait_for

from lightning_moe.sweep import pool
from lightning_moe.sweep.pool import RUN_FOLDER_VARIABLE, Outcome, Pool, PoolRun

#: a ``fit`` that does what its run's name says
FIT = """
import os, signal, subprocess, sys, time
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(options["--output_dir"]) / options["--run_name"]
folder.mkdir()
if folder.name.startswith("finish"):
    (folder / "summary.json").write_text("{}")
elif folder.name == "diverge":
    print("error: The loss is not finite at step 1\\nlast words")
    sys.exit(3)
elif folder.name == "crash":
    print("Traceback\\nRuntimeError: no memory\\n")
    sys.exit(1)
elif folder.name == "killed":
    print("a line", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
elif folder.name.startswith("sleep"):
    if folder.name == "sleep-deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "600"])
    (folder / "started").touch()
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "FIT", (sys.executable, "-c", FIT))
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.02)


def start(pool: Pool[PoolRun], folder: Path, name: str) -> PoolRun:
    run = PoolRun(folder, name)
    pool.start(run, {})
    if name.startswith("sleep"):
        wait_for((run.folder / "started").exists)
    return run


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("finish", Outcome("finished")),
        ("diverge", Outcome("diverged", "error: The loss is not finite at step 1")),
        ("crash", Outcome("failed", "exit code 1: RuntimeError: no memory")),
        ("killed", Outcome("failed", "ended by signal 9, out of memory?: a line")),
    ],
)
def test_an_exit_code_has_a_meaning(name: str, outcome: Outcome, tmp_path: Path) -> None:
    with Pool[PoolRun](1) as pool:
        run = start(pool, tmp_path, name)
        assert pool.wait() == [(run, outcome)]
        assert pool.is_empty


def test_an_end_without_a_summary_is_a_failure(tmp_path: Path) -> None:
    with Pool[PoolRun](1) as pool:
        start(pool, tmp_path, "nothing")
        ((_, outcome),) = pool.wait()
    assert outcome.kind == "failed"
    assert outcome.reason.startswith("exit code 0: ")


def test_as_many_run_as_there_are_slots(tmp_path: Path) -> None:
    with Pool[PoolRun](2) as pool:
        sleeper = start(pool, tmp_path, "sleep")
        assert pool.has_room
        quick = start(pool, tmp_path, "finish-1")
        assert not pool.has_room
        assert pool.wait() == [(quick, Outcome("finished"))]
        start(pool, tmp_path, "finish-2")
        pool.wait()
        pool.stop(sleeper)
        assert pool.wait() == [(sleeper, Outcome("stopped"))]


@pytest.mark.parametrize("name", ["sleep", "sleep-deaf"])
def test_nothing_outlives_the_block(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "STOP_SECONDS", 60.0 if name == "sleep" else 0.5)
    began = time.monotonic()
    with Pool[PoolRun](1) as started:
        start(started, tmp_path, name)
        assert len(processes_of(tmp_path)) == (1 if name == "sleep" else 2)
    wait_for(lambda: processes_of(tmp_path) == [])  # a process lives on for a moment after it was killed
    assert time.monotonic() - began < 60


def test_what_an_earlier_process_left_running_is_killed_first(tmp_path: Path) -> None:
    environment = os.environ | {RUN_FOLDER_VARIABLE: str(tmp_path / "finish")}
    left = subprocess.Popen(["sleep", "600"], env=environment)
    other = subprocess.Popen(["sleep", "600"], env=environment | {RUN_FOLDER_VARIABLE: str(tmp_path / "other")})
    with Pool[PoolRun](1) as pool:
        start(pool, tmp_path, "finish")
        assert left.wait(10) == -9
        assert other.poll() is None
        pool.wait()
    other.kill()
    other.wait()


def test_a_dropped_run_is_gone_and_not_returned(tmp_path: Path) -> None:
    with Pool[PoolRun](1) as pool:
        pool.drop(start(pool, tmp_path, "sleep"))
        assert pool.is_empty
        assert pool.poll() == []
    assert processes_of(tmp_path) == []
