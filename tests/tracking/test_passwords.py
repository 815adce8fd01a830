"""No file of a run and nothing printed holds a password of the tracking URI."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.small_run import Command

from lightning_moe.tracking import MLflowLogger
from lightning_moe.tracking.store import resolve_uri

URIS = ["postgresql://me:S3cret/x y@127.0.0.1:9/m", "postgresql://127.0.0.1:9/m?user=me&password=S3cret"]


def holding(folder: Path, password: bytes = b"S3cret") -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and password in path.read_bytes()]


@pytest.mark.parametrize("uri", URIS)
def test_no_file_of_a_run_has_the_password(command: Command, workplace: Path, uri: str) -> None:
    tags = json.dumps({"proxy": "http://me:S3cret@proxy:3128"})
    flags = ["--tracking.enabled=true", "--tracking.finalize_seconds=0", f"--tracking.tags={tags}"]
    code, out, err = command("fit", "--config", "small.yaml", "--run_name=r", f"--tracking.tracking_uri={uri}", *flags)
    assert code == 0, err
    assert holding(workplace / "runs") == []
    assert "S3cret" not in out + err
    assert "***" in (workplace / "runs/r/config.yaml").read_text()


def test_the_uploading_process_prints_no_password(tmp_path: Path) -> None:
    """What MLflow prints of a server that is away goes to the run's mlflow.log."""
    logger = MLflowLogger(enabled=False, tracking_uri="http://me:S3cret@127.0.0.1:9")
    logger.bind(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    logger.finalize("success")
    settings = {
        "run_dir": str(tmp_path),
        "tracking_uri": "http://me:S3cret@127.0.0.1:9",
        "experiment_name": "x",
        "flush_seconds": 1,
        "finalize_seconds": 0,
    }
    done = subprocess.run(
        [sys.executable, "-m", "lightning_moe.tracking.worker"],
        input=json.dumps(settings) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "127.0.0.1" in done.stderr
    assert "S3cret" not in done.stdout + done.stderr


def test_a_stored_uri_gets_its_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URIS[0])
    assert resolve_uri("postgresql://me:***@127.0.0.1:9/m") == URIS[0]
    with pytest.raises(ValueError, match="its password is not kept"):
        resolve_uri("postgresql://you:***@127.0.0.1:9/m")


def test_an_unused_store_needs_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    MLflowLogger(enabled=False, tracking_uri="http://me:***@127.0.0.1:9")
