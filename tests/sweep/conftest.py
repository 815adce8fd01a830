"""Sweeps in a folder of their own."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from small_sweep import CONTENT, STAND_IN, Make

from lightning_moe.runs.folder import RUN_VARIABLE
from lightning_moe.sweep import pool
from lightning_moe.sweep.spec import Sweep, read_sweep


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Write ``sweep.yaml`` with some top-level keys changed (None removes one), and read it; ``fit`` is a stand-in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RUN_VARIABLE, "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(pool, "FIT", STAND_IN)  # processes that are forked have it, too

    def build(**changes: Any) -> Sweep:
        content = {key: value for key, value in (CONTENT | changes).items() if value is not None}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return read_sweep(path)

    return build
