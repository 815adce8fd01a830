"""``~`` is the home folder in every path that a person gives; no folder of that name appears."""

from pathlib import Path
from typing import Any

import pytest
from helpers.small_run import Command

from lightning_moe.cli.arguments import home_text, named_path
from lightning_moe.config.compose import find_config
from lightning_moe.errors import UserError
from lightning_moe.module import LanguageModel
from lightning_moe.sweep.spec import name_and_folder
from lightning_moe.tracking.store import resolve_uri
from lightning_moe.user_paths import user_path, user_url


@pytest.fixture
def home(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = workplace / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def test_a_run_goes_to_the_home_folder_and_is_found_there(command: Command, workplace: Path, home: Path) -> None:
    (home / "small.yaml").write_text((workplace / "small.yaml").read_text())
    flags = ("--config=~/small.yaml", "--output_dir=~/runs", "--run_name=r", "--tracking.tracking_uri=sqlite:///~/m.db")
    code, _, err = command("fit", *flags)
    assert code == 0, err
    assert (home / "runs/r/summary.json").exists()
    for path in ("~/runs/r/checkpoints/last.ckpt", "last"):
        code, _, err = command("validate", f"--ckpt_path={path}", "--output_dir=~/runs")
        assert code == 0, err
    code, _, err = command("convert", "--ckpt_path=~/runs/r/checkpoints/last.ckpt", "--output=~/x.safetensors")
    assert code == 0, err
    assert (home / "x.safetensors").exists()
    assert not (workplace / "~").exists()


def test_each_place_that_takes_a_path(home: Path) -> None:
    (home / "a.yaml").write_text("")
    assert find_config("~/a") == find_config("~/a.yaml") == home / "a.yaml"
    assert resolve_uri("sqlite:///~/m.db") == f"sqlite:///{home}/m.db"
    assert user_url("journal:///~/j", "storage") == f"journal:///{home}/j"
    assert user_url("postgresql://me@host/~", "storage") == "postgresql://me@host/~"
    assert LanguageModel(init_from="~/a.ckpt").init_from == f"{home}/a.ckpt"
    assert name_and_folder({"output_dir": "~/runs"}, Path("s.yaml"), None) == ("s", home / "runs" / "s")
    assert named_path("--text", "code=~/src") == ("code", f"{home}/src")
    assert home_text("~/a") == f"{home}/a"
    assert home_text("code=~/a") == "code=~/a"
    assert user_path("./~", "x") == Path("./~")


def test_an_unknown_home_folder_is_refused(command: Command, workplace: Path) -> None:
    code, _, err = command("fit", "--config", "small.yaml", "--output_dir=~nobody-of-that-name/runs")
    assert code == 2
    assert "error: output_dir='~nobody-of-that-name/runs': there is no such home folder" in err


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("a/" + "n" * 256, "255 bytes"),
        ("ä" * 128, "255 bytes"),
        ("a\0b", "control character"),
        ({"a": 1}, "must be a path"),
    ],
)
def test_paths_that_no_file_can_have(path: Any, problem: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.file=.*{problem}"):
        user_path(path, "data.file")


def test_the_longest_name_is_taken() -> None:
    assert user_path("n" * 255, "data.file") == Path("n" * 255)
