"""File systems without locks, without fsync of folders, or for reading only."""

import errno
import fcntl
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from lightning_moe import atomic, file_locks
from lightning_moe.atomic import write_atomically
from lightning_moe.data import LocalFiles, TextDataModule, TokenizerConfig
from lightning_moe.errors import UserError
from lightning_moe.internals.optuna import JournalKernelLock
from lightning_moe.sweep.locks import FileLocks
from lightning_moe.tracking.files import LineFile


@pytest.fixture(autouse=True)
def _warn_again() -> None:
    file_locks._warn.cache_clear()
    atomic._warn.cache_clear()


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)


def data(folder: Path) -> TextDataModule:
    if not (folder / "text").exists():
        (folder / "text").mkdir()
        for number in range(40):
            (folder / "text" / f"{number}.txt").write_text(f"text number {number} " * 20)
    return TextDataModule(
        LocalFiles([str(folder / "text")]), TokenizerConfig(270), 16, 4, 0.2, cache_dir=str(folder / "cache")
    )


@pytest.mark.usefixtures("no_locks")
def test_data_are_prepared_without_locks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = data(tmp_path)
    module.prepare_data()
    data(tmp_path).prepare_data()
    assert sorted(os.listdir(tmp_path / "cache")) == [module.directory.name, f"{module.directory.name}.lock"]
    assert len([message for message in caplog.messages if "has no locks" in message]) == 1


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_faster_of_two_processes_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, replace = data(tmp_path), os.replace

    def replace_late(source: Path, target: Path) -> None:
        if Path(target) == module.directory:
            target.mkdir()
            (target / "manifest.json").write_text("of the other process")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_late)
    with pytest.raises(UserError, match="is not JSON"):  # it takes what the other one made
        module.prepare_data()
    assert [path.name for path in (tmp_path / "cache").glob("*.tmp")] == []


@pytest.mark.usefixtures("no_locks")
def test_records_need_no_locks_and_sweeps_say_that_they_do(tmp_path: Path) -> None:
    assert LineFile(tmp_path / "metrics.jsonl").try_lock()
    with pytest.raises(UserError, match=r"study\.lock: its file system has no locks"):
        FileLocks(tmp_path / "study.lock").try_lock(1)
    with pytest.raises(UserError, match=r"journal\.lock: its file system has no locks"):
        JournalKernelLock(str(tmp_path / "journal.lock")).acquire()


def test_folders_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fsync = os.fsync

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    with caplog.at_level(logging.WARNING):
        write_atomically(tmp_path / "a", b"one")
        write_atomically(tmp_path / "a", b"two")
        with atomic.atomic_folder(tmp_path / "folder") as new:
            (new / "b").write_text("b")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert (tmp_path / "folder/b").read_text() == "b"
    assert len([message for message in caplog.messages if "does not sync folders" in message]) == 1


def test_a_failing_disk_is_no_file_system_without_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(tmp_path / "a", b"one")


def test_prepared_data_are_used_from_a_folder_for_reading_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data(tmp_path).prepare_data()
    before = sorted(path for path in (tmp_path / "cache").rglob("*") if path.name != "checked.json")
    (data(tmp_path).directory / "checked.json").unlink()
    real = os.open

    def for_reading_only(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(tmp_path / "cache")):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *args, **kwargs)

    def refuse(*args: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(args[0]))

    monkeypatch.setattr(os, "open", for_reading_only)
    monkeypatch.setattr(os, "replace", refuse)
    module = data(tmp_path)
    module.prepare_data()
    module.setup("fit")
    assert sorted((tmp_path / "cache").rglob("*")) == before
    other = data(tmp_path)
    other.validation_fraction = 0.3
    with pytest.raises(UserError, match=r"cannot write in .*cache: Read-only file system; set another, or LIGHTNING_"):
        other.prepare_data()


def test_without_a_home_folder_the_setting_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_MOE_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    with pytest.raises(UserError, match=r"data.cache_dir .or LIGHTNING_MOE_CACHE.=.*there is no such home folder"):
        TextDataModule()
