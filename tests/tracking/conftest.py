"""What the tracking tests share: a fresh MLflow store, and a run recorded without the uploading process."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_moe.tracking.session import RunSession


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables in it (making one takes seconds; copying it does not)."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> str:
    """The URI of a store of this test's own."""
    path = tmp_path / "mlflow.db"
    shutil.copy(empty_store, path)
    return f"sqlite:///{path}"


@pytest.fixture
def session(store: str, tmp_path: Path) -> Iterator[RunSession]:
    """A run that is recorded on disk only, for the store of this test."""
    session = RunSession(tmp_path / "runs" / "a-run", store, "an-experiment", None, 1.0, {})
    yield session
    session.close()
