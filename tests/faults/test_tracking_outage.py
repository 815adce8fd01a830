"""Training beside a real MLflow server that is away: it ends well, its record is whole, and nothing stays missing."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_runs import Process, RunFiles, Workplace
from helpers.mlflow_server import PATIENCE, Server
from mlflow import MlflowClient

from lightning_moe.tracking.state import read_state

UPLOAD = r"`python (-m lightning_moe\.tracking (\S+))` sends"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables in it."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def server(empty_store: Path, tmp_path: Path) -> Iterator[Server]:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    server = Server(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "server")
    yield server
    server.kill()


def start(place: Workplace, server: Server, name: str, point: str, call: int, seconds: float) -> Process:
    """A run that waits at a point for `Process.go_on`; ``seconds``: how long it waits for MLflow in the end."""
    tracking = {"enabled": "true", "tracking_uri": server.url, "flush_seconds": "0.2", "finalize_seconds": str(seconds)}
    flags = [f"--tracking.{key}={value}" for key, value in tracking.items()]
    process = place.start(f"--run_name={name}", *flags, fault={"point": point, "call": call, "effect": "hold"})
    process.wait_for_fault()
    return process


def wait_until(process: Process, done: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, process.log.read_text()
        time.sleep(0.1)


def sent(run: RunFiles) -> int:
    """Bytes of the metrics that MLflow has."""
    state = read_state(run.folder)
    return state.sent_metrics if state else 0


def assert_mlflow_has_all(run: RunFiles, server: Server) -> None:
    state = read_state(run.folder)
    assert state is not None
    client = MlflowClient(server.url)
    assert client.get_run(state.run_id).info.status == "FINISHED"
    for metric in ("train/loss", "val/loss"):
        recorded = [(line["step"], line[metric]) for line in run.metrics() if metric in line]
        stored = [(point.step, point.value) for point in client.get_metric_history(state.run_id, metric)]
        assert stored == recorded != []


@pytest.mark.parametrize(
    ("when", "point", "call"),
    [
        pytest.param("start", "between steps", 9, marks=pytest.mark.faults),
        pytest.param("middle", "between steps", 9, marks=pytest.mark.slow),
        pytest.param("end", "before a checkpoint's name", 5, marks=pytest.mark.faults),
    ],
)
def test_a_run_whose_server_goes_away_is_whole_and_can_be_sent(
    when: str, point: str, call: int, server: Server, workplace: Callable[[str], Workplace]
) -> None:
    place = workplace("1 process")
    run = place.run(f"away at the {when}".replace(" ", "-"))
    if when != "start":
        server.start()
    process = start(place, server, run.folder.name, point, call, seconds=2.0)
    if when != "start":
        wait_until(process, lambda: sent(run) > 0)
    server.kill()
    process.go_on()
    ended = process.wait()

    assert ended.code == 0, ended.output
    assert run.metrics() == place.run("whole").metrics()
    assert (run.folder / "summary.json").exists()
    assert f"MLflow at {server.url} did not take the whole run in time" in ended.output
    assert "Traceback" not in ended.output

    server.start()
    (command, folder) = re.findall(UPLOAD, ended.output)[-1]  # what the message says
    assert Path(folder) == run.folder
    told = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, cwd="/", check=False)
    assert told.returncode == 0, told.stderr
    assert_mlflow_has_all(run, server)


@pytest.mark.faults
def test_a_server_that_comes_late_gets_everything(server: Server, workplace: Callable[[str], Workplace]) -> None:
    place = workplace("1 process")
    run = place.run("late")
    process = start(place, server, "late", "between steps", 9, seconds=PATIENCE)
    # heard when the next line of metrics is recorded, so in the file of the uploading process before
    wait_until(process, lambda: (run.folder / "mlflow.log").read_text().count("Traceback (most recent") >= 2)
    server.start()
    process.go_on()
    ended = process.wait()
    assert ended.code == 0, ended.output
    assert f"MLflow at {server.url} does not take the metrics: " in ended.output
    assert "answers again and has everything" in ended.output
    assert "did not take the whole run" not in ended.output
    assert run.metrics() == place.run("whole").metrics()
    assert_mlflow_has_all(run, server)
