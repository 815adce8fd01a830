"""The services of compose.yaml without an engine: the same commands and variables, programs of this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
import yaml
from compose_file import FOLDER, interpolate, parse, read_env
from docker_file import environment
from helpers.postgres_server import PostgresServer
from helpers.tiny_experiment import write_tiny_experiment
from mlflow import MlflowClient

pytestmark = pytest.mark.slow
PASSWORD = "correcthorse"
PATIENCE = 180.0


class Services:
    """The compose file with names, ports and folders of the containers replaced by those of this machine.

    Args:
        content: of the compose file, without variables.
        here: text in the file → text for this machine.
        folder: where the services run.
    """

    def __init__(self, content: dict[str, Any], here: dict[str, str], folder: Path) -> None:
        self._services, self._here, self._folder = content["services"], here, folder
        self._image = environment(FOLDER / "Dockerfile")

    def translated(self, text: str) -> str:
        for there, here in self._here.items():
            text = text.replace(there, here)
        return text

    def start(self, name: str, **options: Any) -> subprocess.Popen[str]:
        """The service's command, with the variables of the image and of the service, and no others of this process."""
        service = self._services[name]
        return self._popen(service["command"], self._image | service["environment"], **options)

    def is_healthy(self, name: str) -> bool:
        kind, *command = self._services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        return self._popen(command, {}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait() == 0

    def wait_for(self, name: str, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.is_healthy(name):
            assert process.poll() is None, f"{name} has ended"
            assert time.monotonic() < deadline, f"{name} does not become healthy"
            time.sleep(0.5)

    def _popen(self, command: list[str], variables: dict[str, str], **options: Any) -> subprocess.Popen[str]:
        variables = {key: self.translated(value) for key, value in variables.items() if key != "PATH"}
        programs = [str(Path(sys.executable).parent), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
        path = os.pathsep.join([*programs, os.environ["PATH"]])
        home = {"PATH": path, "HOME": str(self._folder), "OMP_NUM_THREADS": "1"}
        words = [self.translated(word) for word in command]
        return subprocess.Popen(
            ["env", *words], cwd=self._folder, env=home | variables, text=True, start_new_session=True, **options
        )


@contextmanager
def stopped_at_the_end(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_databases(content: dict[str, Any], server: PostgresServer) -> None:
    """What the entry point of PostgreSQL's image does when the volume is empty."""
    service = content["services"]["postgres"]
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {service['environment']['POSTGRES_DB']}")
    source, target, _ = service["volumes"][1].split(":")
    assert target.startswith("/docker-entrypoint-initdb.d/")
    assert target.endswith(".sql")
    url = server.url.replace("/postgres", f"/{service['environment']['POSTGRES_DB']}")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute((FOLDER / source).read_bytes())


def status(url: str, host: str) -> int:
    """Of a request that calls the server by this name."""
    request = urllib.request.Request(f"{url}/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": host})
    try:
        return int(urllib.request.urlopen(request, timeout=30).status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_sweep_through_the_services_of_the_compose_file(tmp_path: Path) -> None:
    sweep = yaml.safe_load((FOLDER / "sweep.yaml").read_text())
    sweep["config"].append(write_tiny_experiment(tmp_path, max_steps=6, val_check_interval=3))
    sweep["budget"] = {"trials": 2}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    variables = read_env((FOLDER / ".env.example").read_text()) | {"POSTGRES_PASSWORD": PASSWORD}
    content = interpolate(parse((FOLDER / "compose.yaml").read_text()), variables)
    role = content["services"]["postgres"]["environment"]
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with PostgresServer(role["POSTGRES_USER"], role["POSTGRES_PASSWORD"]) as postgres, ExitStack() as running:
        here = {
            "@postgres:5432": f"@127.0.0.1:{postgres.port}",
            "--port=5432": f"--port={postgres.port}",
            "http://mlflow:5000": url,
            "http://127.0.0.1:5000": url,
            "--host=0.0.0.0": "--host=127.0.0.1",
            "--port=5000": f"--port={port}",
            "=/artifacts": f"={tmp_path}/artifacts",
            "/data": str(tmp_path),
        }
        services = Services(content, here, tmp_path)
        make_databases(content, postgres)
        assert services.is_healthy("postgres")
        assert not services.is_healthy("mlflow")

        log = running.enter_context((tmp_path / "mlflow.log").open("w"))
        server = services.start("mlflow", stdout=log, stderr=log)
        running.enter_context(stopped_at_the_end(server))
        services.wait_for("mlflow", server)
        assert PASSWORD not in Path(f"/proc/{server.pid}/cmdline").read_text()
        assert status(url, "mlflow:5000") == 200  # as the worker calls it in its network
        assert status(url, f"localhost:{port}") == 200
        assert status(url, "elsewhere.example") == 403

        worker = services.start("worker", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        running.enter_context(stopped_at_the_end(worker))
        out, _ = worker.communicate(timeout=400)
        assert worker.returncode == 0, out
        assert PASSWORD not in out

        storage = services.translated(content["services"]["worker"]["environment"]["SWEEP_STORAGE"])
        study = optuna.load_study(study_name=sweep["name"], storage=storage.replace("://", "+psycopg://"))
        assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]

        client = MlflowClient(url)
        experiment = client.get_experiment_by_name("lightning_moe")
        assert experiment
        runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        assert set(runs) == {sweep["name"], "trial-0000-s1", "trial-0001-s1"}
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        for trial in study.trials:
            run = runs[f"trial-{trial.number:04d}-s1"]
            assert run.data.tags["mlflow.parentRunId"] == runs[sweep["name"]].info.run_id
            assert run.data.metrics["val/loss"] == pytest.approx(trial.value)
            assert run.info.artifact_uri.startswith("mlflow-artifacts:")
            address = f"{url}/get-artifact?path=config.yaml&run_uuid={run.info.run_id}"
            config = yaml.safe_load(urllib.request.urlopen(address, timeout=30).read())
            for key, value in trial.params.items():
                assert config["model"]["routing"]["init_args"][key.rpartition(".")[2]] == value
            assert len(list((tmp_path / "artifacts").glob(f"**/{run.info.run_id}/artifacts/config.yaml"))) == 1
        summary = json.loads((tmp_path / "runs" / sweep["name"] / "trial-0000-s1" / "summary.json").read_text())
        assert summary["loss"] == pytest.approx(study.trials[0].value)
        assert list((tmp_path / "cache").iterdir())
