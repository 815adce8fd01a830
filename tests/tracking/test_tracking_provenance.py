"""What a run says it was made with."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import lightning_moe
from lightning_moe.tracking.provenance import device, git_state, provenance, versions


def git(folder: Path, *args: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The first file of a package in a repository of its own."""
    file = tmp_path / "package" / "__init__.py"
    file.parent.mkdir()
    file.write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return file


def test_the_commit_of_an_unchanged_checkout(package: Path):
    commit = git(package.parent, "rev-parse", "HEAD")
    (package.parent.parent / "notes.txt").write_text("beside the code")
    assert git_state(package) == {"git_commit": commit, "git_dirty": "false"}


@pytest.mark.parametrize("name", ["__init__.py", "new_module.py"])
def test_changed_and_new_code_makes_it_dirty(package: Path, name: str):
    package.with_name(name).write_text("changed = True")
    assert git_state(package)["git_dirty"] == "true"


def test_code_that_no_repository_tracks_has_no_commit(package: Path, tmp_path_factory: pytest.TempPathFactory):
    installed = package.parent.parent / ".venv" / "package" / "__init__.py"  # inside someone else's checkout
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    outside = tmp_path_factory.mktemp("outside") / "__init__.py"
    outside.write_text("")
    assert git_state(installed) == {}
    assert git_state(outside) == {}


def test_without_git_there_is_no_commit(package: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert git_state(package) == {}


def test_versions_are_the_installed_ones():
    assert versions() == {
        "version.python": platform.python_version(),
        "version.lightning_moe": lightning_moe.__version__,
        "version.torch": torch.__version__,
        "version.lightning": version("lightning"),
        "version.mlflow": version("mlflow"),
    }


def test_nothing_names_the_host_or_the_user():
    text = " ".join(provenance().values())
    assert platform.node() not in text
    assert device() in text
