"""What a killed process left beside its files is removed at the next start or save; what a living one writes stays."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.small_run import Command

from lightning_moe.atomic import atomic_folder, atomic_open, remove_leftovers, write_atomically

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_save_removes_what_a_killed_save_left(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys\n"
        "from lightning_moe.atomic import atomic_open\n"
        "with atomic_open(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'half')\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / ".last.ckpt.pending")])
    (left,) = os.listdir(tmp_path)
    assert left.startswith("..last.ckpt.pending.")
    assert left.endswith(".tmp")
    write_atomically(tmp_path / ".last.ckpt.pending", b"whole")
    assert os.listdir(tmp_path) == [".last.ckpt.pending"]


def test_only_those_of_dead_processes_and_of_the_same_file_go(tmp_path: Path, dead: int) -> None:
    gone = [f".a.{dead}@{HOST}.tmp", f".a.{dead}.tmp"]
    kept = [
        f".a.{os.getppid()}@{HOST}.tmp",  # it lives
        f".a.{dead}@another-machine.tmp",
        f".b.{dead}@{HOST}.tmp",
        ".a.tmp",
        ".a.x.tmp",
    ]
    for name in (*gone, *kept):
        (tmp_path / name).write_text("")
    (tmp_path / f".a.{dead}@{HOST}.old").mkdir()
    (tmp_path / "a").write_text("")
    write_atomically(tmp_path / "a", b"")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "a"])
    remove_leftovers(tmp_path, other_machines=True)
    assert sorted(os.listdir(tmp_path)) == sorted([kept[0], *kept[3:], "a"])


def test_one_process_may_write_two_files_at_once(tmp_path: Path) -> None:
    with atomic_open(tmp_path / "a") as first, atomic_open(tmp_path / "b") as second:
        first.write(b"a")
        second.write(b"b")
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()) == (b"a", b"b")


def test_a_folder_that_was_set_aside_when_the_process_died_comes_back(tmp_path: Path, dead: int) -> None:
    (tmp_path / f".export.{dead}@{HOST}.old").mkdir()
    (tmp_path / f".export.{dead}@{HOST}.old" / "file").write_text("the only copy")
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "export") as new:
        (new / "file").write_text("new")
    assert (tmp_path / "export/file").read_text() == "the only copy"
    assert os.listdir(tmp_path) == ["export"]


def test_the_next_start_of_a_run_removes_them(command: Command, workplace: Path, dead: int) -> None:
    flags = ("--config", "small.yaml", "--run_name=r")
    assert command("fit", *flags)[0] == 0
    checkpoints = workplace / "runs/r/checkpoints"
    left = [checkpoints / f"..last.ckpt.pending.{dead}@elsewhere.tmp", checkpoints.parent / f".summary.json.{dead}.tmp"]
    living = checkpoints / f"..last.ckpt.pending.{os.getppid()}@{HOST}.tmp"
    for path in (*left, living):
        path.write_text("")
    code, _, err = command("fit", "--ckpt_path=last", "--run_name=r", "--trainer.max_steps=5")
    assert code == 0, err
    assert [path for path in left if path.exists()] == []
    assert living.exists()
