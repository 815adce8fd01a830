"""Files as an MLflow run of their own: an address only where the store has them."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from lightning_moe.tracking import files_run
from lightning_moe.tracking.files_run import log_files


def test_an_address_is_given_only_when_everything_was_sent(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, page = tmp_path / "page", tmp_path / "page.md"
    page.write_text("words")
    address = log_files(folder, store, "pages", {page: None}, {"kind": "study"})
    assert address is not None
    run_id = address.rpartition("/")[2].partition("?")[0]
    assert [file.path for file in MlflowClient(store).list_artifacts(run_id)] == ["page.md"]
    monkeypatch.setattr(files_run, "FINALIZE_SECONDS", 1.0)
    away = store.replace("mlflow.db", "gone/mlflow.db")
    (tmp_path / "gone").write_text("no folder")
    assert log_files(folder, away, "pages", {page: None}, {"kind": "study"}) is None
    assert "did not take the whole run" in caplog.text
