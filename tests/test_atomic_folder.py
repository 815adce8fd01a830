"""A folder appears whole or not at all."""

import os
from pathlib import Path

import pytest

from lightning_moe.atomic import atomic_folder, check_writable


def write(folder: Path, text: str, replace: bool = False) -> None:
    with atomic_folder(folder, replace) as new:
        (new / "inner").mkdir()
        (new / "inner/file").write_text(text)
        assert not (folder / "inner/file").exists() or (folder / "inner/file").read_text() != text


def test_it_appears_at_the_end_and_replaces_only_when_told(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "new"
    write(folder, "one")
    assert (folder / "inner/file").read_text() == "one"
    with pytest.raises(OSError, match="not empty"):
        write(folder, "two")
    assert (folder / "inner/file").read_text() == "one"
    write(folder, "three", replace=True)
    assert (folder / "inner/file").read_text() == "three"
    assert os.listdir(folder.parent) == ["new"]


def test_a_check_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "deep" / "new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    check_writable(tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())
    (tmp_path / "file").write_text("mine")
    for path in ("file", "file/deep/new"):
        with pytest.raises(OSError, match=r"File exists|Not a directory"):
            check_writable(tmp_path / path)
    with pytest.raises(OSError, match=r"No such file|not permitted|denied"):  # for root, too
        check_writable(Path("/proc/new"))
    assert sorted(os.listdir(tmp_path)) == ["file", "mine"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "a", "one")
    for name in ("a", "b"):
        with pytest.raises(UnicodeEncodeError), atomic_folder(tmp_path / name, replace=True) as new:
            (new / "half").write_text("half \ud800", encoding="utf-8")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a/inner/file").read_text() == "one"
