"""The uploading process beside a training process: real processes, real failures."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lightning_moe.tracking import read_metrics, upload
from lightning_moe.tracking.session import RunSession
from lightning_moe.tracking.state import read_state

PATIENCE = 120.0  # seconds that a loaded machine may take; a test that waits this long has failed


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def run_with_process(run_dir: Path, uri: str, finalize_seconds: float = PATIENCE) -> RunSession:
    return RunSession(run_dir, uri, "an-experiment", 0.2, finalize_seconds, {})


def stored_values(uri: str, run_dir: Path, name: str) -> list[float]:
    state = read_state(run_dir)
    assert state
    return [point.value for point in MlflowClient(uri).get_metric_history(state.run_id, name)]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.slow
def test_two_runs_started_at_once_on_a_store_that_does_not_exist_yet(tmp_path: Path, caplog):
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    runs = [run_with_process(tmp_path / "runs" / name, uri) for name in ("first", "second")]
    for step in range(3):
        for run in runs:
            run.log_metrics(step, {"loss": float(step)})
    for run in runs:
        run.end("FINISHED")
        run.close()

    assert messages(caplog) == []
    for run in runs:
        assert stored_values(uri, run.run_dir, "loss") == [0.0, 1.0, 2.0]
    experiments = {read_state(run.run_dir).experiment_id for run in runs}
    found = MlflowClient(uri).search_runs(list(experiments))
    assert {(run.info.run_name, run.info.status) for run in found} == {("first", "FINISHED"), ("second", "FINISHED")}
    assert len(experiments) == 1


def test_what_comes_after_the_end_is_sent_by_close(tmp_path: Path, store: str):
    run = run_with_process(tmp_path / "run", store)
    run.log_metrics(0, {"loss": 1.0})
    run.end("FINISHED")
    run.log_metrics(1, {"test/loss": 2.0})
    run.log_event("tags", tags={"late": "yes"})
    run.close()
    state = read_state(tmp_path / "run")
    found = MlflowClient(store).get_run(state.run_id)
    assert found.data.metrics == {"loss": 1.0, "test/loss": 2.0}
    assert found.data.tags["late"] == "yes"
    assert found.info.status == "FINISHED"


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_store_that_is_away_costs_one_warning_and_nothing_of_the_record(
    tmp_path: Path, store: str, free_port: int, caplog
):
    away = f"http://127.0.0.1:{free_port}"
    run = run_with_process(tmp_path / "run", away, finalize_seconds=1.0)
    step = 0
    while not messages(caplog):  # training goes on meanwhile
        run.log_metrics(step, {"loss": float(step)})
        step += 1
        time.sleep(0.01)
    run.log_metrics(step, {"loss": float(step)})
    run.end("FINISHED")
    run.close()

    first, last = messages(caplog)
    assert first.startswith(f"MLflow at {away} does not take the metrics: ")
    assert "Training goes on" in first
    assert last.startswith(f"MLflow at {away} did not take the whole run in time (1 s at most).")
    for message in (first, last):
        assert f"`python -m lightning_moe.tracking {run.run_dir}` sends" in message
    assert [line["step"] for line in read_metrics(run.run_dir)] == list(range(step + 1))

    upload(run.run_dir, tracking_uri=store)
    assert stored_values(store, run.run_dir, "loss") == [float(value) for value in range(step + 1)]


def test_a_store_that_hangs_is_not_waited_for(tmp_path: Path, caplog):
    with socket.socket() as mute:  # takes connections, never answers
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        run = run_with_process(tmp_path / "run", f"http://127.0.0.1:{mute.getsockname()[1]}", finalize_seconds=0.5)
        run.log_metrics(0, {"loss": 0.0})
        connection, _ = mute.accept()  # from here on the process waits for an answer that never comes
        for step in range(1, 1000):
            run.log_metrics(step, {"loss": float(step)})
        run.end("FINISHED")
        run.close()
        connection.close()
    assert [line["step"] for line in read_metrics(run.run_dir)] == list(range(1000))
    (message,) = messages(caplog)
    assert "did not take the whole run in time (0.5 s at most)" in message


def test_ctrl_c_ends_the_wait_and_not_the_success(tmp_path: Path, free_port: int, caplog):
    def press(*_: object) -> None:
        raise KeyboardInterrupt

    run = run_with_process(tmp_path / "run", f"http://127.0.0.1:{free_port}")
    run.log_metrics(0, {"loss": 1.0})
    handler = signal.signal(signal.SIGALRM, press)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        run.end("FINISHED")
    finally:
        signal.signal(signal.SIGALRM, handler)
    run.close()
    (message,) = messages(caplog)
    assert "did not take the whole run in time" in message
    last = json.loads((run.run_dir / "tracking.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["status"]) == ("end", "FINISHED")


def test_a_process_that_dies_is_told_once_and_training_goes_on(tmp_path: Path, store: str, caplog):
    run = run_with_process(tmp_path / "run", store)
    run.log_metrics(0, {"loss": 0.0})
    assert run._process
    os.kill(run._process._process.pid, signal.SIGKILL)
    step = 1
    while not messages(caplog):
        run.log_metrics(step, {"loss": float(step)})
        step += 1
        time.sleep(0.01)
    run.end("FINISHED")
    run.close()

    (first, second) = messages(caplog)
    assert first.startswith("The process that sends run run to MLflow ended (exit code -9; see ")
    assert "did not take the whole run" in second
    upload(run.run_dir)
    assert stored_values(store, run.run_dir, "loss") == [float(value) for value in range(step)]


TRAINING = """
import os, signal, sys, time
from pathlib import Path
from lightning_moe.tracking.session import RunSession

run = RunSession(Path(sys.argv[1]), sys.argv[2], "an-experiment", 60.0, 120.0, {})
for step in range(5):
    run.log_metrics(step, {"loss": float(step)})
os.kill(os.getpid(), int(sys.argv[3]))
time.sleep(60)
"""


@pytest.mark.slow
def test_a_killed_training_process_still_has_its_last_metrics_sent_and_the_run_closed(tmp_path: Path, store: str):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", TRAINING, str(run_dir), store, str(int(signal.SIGKILL))]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL

    def status() -> str | None:
        state = read_state(run_dir)
        return MlflowClient(store).get_run(state.run_id).info.status if state else None

    wait_until(lambda: status() == "KILLED")
    assert stored_values(store, run_dir, "loss") == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.slow
def test_the_training_process_never_imports_mlflow_and_the_uploading_one_never_torch(tmp_path: Path, store: str):
    code = (
        "import sys; from lightning_moe.tracking import MLflowLogger;"
        f"logger = MLflowLogger(tracking_uri={store!r}); logger.bind({str(tmp_path / 'run')!r});"
        "logger.log_config('a: 1'); logger.log_metrics({'a': 1.0}, step=0); logger.finalize('success'); logger.close();"
        "assert 'torch' in sys.modules; assert not {'mlflow', 'sqlalchemy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys, lightning_moe.tracking.worker, lightning_moe.tracking.uploader; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_command_sends_a_run_and_says_what_it_cannot(tmp_path: Path, store: str):
    run = RunSession(tmp_path / "run", store, "an-experiment", None, 1.0, {})
    run.log_metrics(0, {"loss": 1.0})
    run.end("FINISHED")
    command = [sys.executable, "-m", "lightning_moe.tracking"]
    done = subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:27]) == (0, "MLflow has the whole run: h")
    assert stored_values(store, tmp_path / "run", "loss") == [1.0]

    failed = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr.partition("holds no run")[1]) == (2, "holds no run")
    assert json.loads((tmp_path / "run" / "mlflow_run.json").read_text())["tracking_uri"] == store
