"""With a real `mlflow server` that is started, killed and started again."""

import shlex
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.mlflow_server import PATIENCE, Server
from mlflow import MlflowClient

from lightning_moe.tracking import read_metrics, upload
from lightning_moe.tracking.process import log as process_log
from lightning_moe.tracking.session import RunSession
from lightning_moe.tracking.state import read_state
from lightning_moe.tracking.store import run_url

pytestmark = pytest.mark.slow


@pytest.fixture
def server(store: str, tmp_path: Path) -> Iterator[Server]:
    server = Server(store, tmp_path / "server")
    yield server
    server.kill()


def start_run(tmp_path: Path, url: str, finalize_seconds: float = PATIENCE) -> RunSession:
    return RunSession(tmp_path / "run", url, "an-experiment", 0.2, finalize_seconds, {})


def train_until(run: RunSession, steps: Iterator[int], done) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, "it never happened"
        step = next(steps)
        run.log_metrics(step, {"loss": float(step)})
        time.sleep(0.02)


def stored(store: str, run: RunSession) -> tuple[str, list[float]]:
    """The run's status and its losses, read from the database without the server."""
    state = read_state(run.run_dir)
    assert state
    client = MlflowClient(store)
    return client.get_run(state.run_id).info.status, [
        point.value for point in client.get_metric_history(state.run_id, "loss")
    ]


def recorded(run: RunSession) -> list[float]:
    return [line["loss"] for line in read_metrics(run.run_dir)]


def said(caplog: pytest.LogCaptureFixture, words: str) -> bool:
    return any(words in record.getMessage() for record in caplog.records if record.name == process_log.name)


def test_a_server_that_starts_after_the_run(server: Server, store: str, tmp_path: Path, caplog):
    run, steps = start_run(tmp_path, server.url), iter(range(10**6))
    train_until(run, steps, lambda: said(caplog, "does not take the metrics"))
    server.start()
    train_until(run, steps, lambda: said(caplog, "answers again and has everything"))
    run.end("FINISHED")
    run.close()
    assert stored(store, run) == ("FINISHED", recorded(run))


def test_a_server_that_dies_and_returns(server: Server, store: str, tmp_path: Path, caplog):
    server.start()
    run, steps = start_run(tmp_path, server.url), iter(range(10**6))
    train_until(run, steps, lambda: (state := read_state(run.run_dir)) and state.sent_metrics > 1000)
    server.kill()
    before = next(steps)
    train_until(run, steps, lambda: said(caplog, "does not take the metrics"))
    server.start()
    train_until(run, steps, lambda: said(caplog, "answers again and has everything"))
    run.log_metrics(next(steps), {"loss": float("nan")})  # over HTTP as well
    run.end("FINISHED")
    run.close()
    status, losses = stored(store, run)
    assert (status, losses[:-1]) == ("FINISHED", recorded(run)[:-1])
    assert losses[-1] != losses[-1]
    assert len(losses) > before
    warnings = [record for record in caplog.records if record.name == process_log.name]
    assert len(warnings) == 2  # one for the outage, one for its end


def test_a_server_that_is_dead_at_the_end(server: Server, store: str, tmp_path: Path, caplog):
    server.start()
    run, steps = start_run(tmp_path, server.url, finalize_seconds=1.0), iter(range(10**6))
    train_until(run, steps, lambda: (state := read_state(run.run_dir)) and state.sent_metrics > 500)
    server.kill()
    for _ in range(100):
        step = next(steps)
        run.log_metrics(step, {"loss": float(step)})
    run.end("FINISHED")
    run.close()
    status, losses = stored(store, run)
    assert status == "RUNNING"
    assert len(losses) < len(recorded(run))

    server.start()
    upload(run.run_dir)  # the server that the run was made for
    assert stored(store, run) == ("FINISHED", recorded(run))


def test_a_server_that_returns_while_the_end_is_waited_for(server: Server, store: str, tmp_path: Path):
    run = start_run(tmp_path, server.url, finalize_seconds=30.0)
    run.log_metrics(0, {"loss": 1.0})
    time.sleep(17)  # five attempts have failed; in training the next would come after 16 s, and then after 32
    starting = threading.Timer(1.0, server.start)
    starting.start()

    run.end("FINISHED")

    starting.join()
    run.close()
    assert stored(store, run) == ("FINISHED", [1.0])


def test_the_ui_command_serves_this_very_run(server: Server, store: str, tmp_path: Path):
    """The command is the one `Server` starts; the store was written without any server."""
    run = start_run(tmp_path, store)
    run.log_metrics(3, {"train/loss": 0.25})
    (run.run_dir / "config.yaml").write_text("seed: 1\n")
    run.log_event("artifact", path="config.yaml", folder=None)
    run.end("FINISHED")
    run.close()
    state = read_state(run.run_dir)
    assert state

    server.start()

    assert server.command
    words = shlex.split(server.command)
    assert words[words.index("--host") + 1] == "127.0.0.1"
    page = run_url(store, state.experiment_id, state.run_id, server.port)
    assert page == f"{server.url}/#/experiments/{state.experiment_id}/runs/{state.run_id}?workflowType=machine_learning"
    assert b"<title>MLflow" in urllib.request.urlopen(page.partition("#")[0], timeout=30).read()
    over_http = MlflowClient(server.url).get_run(state.run_id)
    assert over_http.data.metrics == {"train/loss": 0.25}
    assert over_http.info.experiment_id == state.experiment_id
    artifact = f"{server.url}/get-artifact?path=config.yaml&run_uuid={state.run_id}"
    assert urllib.request.urlopen(artifact, timeout=30).read() == b"seed: 1\n"
    assert list(server.folder.iterdir()) == []  # nothing is left in the working directory
    rival = start_run(tmp_path / "over-http", server.url)
    (rival.run_dir).mkdir(parents=True)
    (rival.run_dir / "a.txt").write_text("sent by HTTP")
    rival.log_event("artifact", path="a.txt", folder="notes")
    rival.end("FINISHED")
    rival.close()
    other = read_state(rival.run_dir)
    assert other
    artifact = f"{server.url}/get-artifact?path=notes/a.txt&run_uuid={other.run_id}"
    assert urllib.request.urlopen(artifact, timeout=30).read() == b"sent by HTTP"
