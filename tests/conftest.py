"""One thread per test process (tiny tensors; machines with few cores), no time limits in property tests, and a small
experiment that the real command trains in a second, in a folder of its own.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers.triton_on_cpu  # noqa: F401 - before anything imports Triton
import lightning.pytorch  # noqa: F401 - before any test captures the stream that its log handler keeps
import pytest
import torch
import yaml
from helpers.gloo_pair import GlooPair
from helpers.small_run import SMALL, Command
from hypothesis import settings

from lightning_moe.cli import main
from lightning_moe.runs.folder import RUN_VARIABLE

torch.set_num_threads(1)
settings.register_profile("quick", deadline=None, max_examples=50)
settings.load_profile("quick")
# A suite that a script starts in the background inherits an ignored Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what the tests' runs remember (`trust.known_file`) out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def gloo_pair() -> Iterator[GlooPair]:
    """Two processes that form one gloo group, shared by all tests of the session."""
    with GlooPair() as pair:
        yield pair


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Environment and corpus of the small experiment; prepared once per session."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for number in range(200):
        lines = [f"line {i} of file {number} says {(i * number) % 97} in words" for i in range(12)]
        (folder / "text" / f"{number:03}.txt").write_text("\n".join(lines))
    corpus = {"class_path": "LocalFiles", "init_args": {"paths": [str(folder / "text")]}}
    return {"cache": str(folder / "cache"), "corpus": corpus}


@pytest.fixture
def workplace(tmp_path: Path, small_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with ``small.yaml``; nothing outside of it is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_MOE_CACHE", small_data["cache"])
    monkeypatch.setenv(RUN_VARIABLE, "")
    for variable in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "MLFLOW_TRACKING_URI", "LIGHTNING_MOE_DEBUG"):
        monkeypatch.delenv(variable, raising=False)
    config = SMALL | {"data": SMALL["data"] | {"corpus": small_data["corpus"]}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture
def command(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line in this process; returns exit code, stdout and stderr."""

    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(args)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        finally:
            os.environ[RUN_VARIABLE] = ""
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
