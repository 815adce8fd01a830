"""Sweeps in a folder of their own."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from small_sweep import CONTENT, Make

from lightning_moe.runs.folder import RUN_VARIABLE
from lightning_moe.sweep.spec import Sweep, read_sweep


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Write ``sweep.yaml`` with some top-level keys changed (null takes one out), and read it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RUN_VARIABLE, "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def build(**changes: Any) -> Sweep:
        content = {key: value for key, value in (CONTENT | changes).items() if value is not None}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return read_sweep(path)

    return build
