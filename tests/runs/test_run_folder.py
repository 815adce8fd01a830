"""Run folders: names, claims, the checkpoint to continue from, and files that are whole or absent."""

import os
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lightning_moe.atomic import atomic_open
from lightning_moe.errors import UserError
from lightning_moe.processes import process_rank
from lightning_moe.runs import folder as rundir
from lightning_moe.trust import check_name


def checkpoint(output_dir: Path, run: str, name: str, time: int) -> Path:
    path = output_dir / run / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", b"the content of a checkpoint" * 100)
    os.utime(path, (time, time))
    return path


def test_generated_name_tells_routing_seed_and_time() -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    name, _, time = rundir.generated_name("expert_threshold", "7").rpartition("-")
    assert name == "expert_threshold-s7"
    assert before <= datetime.strptime(time, "%Y%m%dT%H%M%S%z") <= datetime.now(UTC)
    assert rundir.routing_name("lightning_moe.routing.ExpertThreshold") == "expert_threshold"
    assert rundir.routing_name(None) == "dense"
    assert rundir.routing_name("TokenChoiceLossFree") == "token_choice_loss_free"


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "", "a b", "ä", "a\n"])
def test_a_name_that_is_no_plain_folder_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="run_name="):
        check_name(name, "run_name")


def test_a_taken_name_is_refused_or_numbered(tmp_path: Path) -> None:
    assert rundir.claim(tmp_path / "runs" / "a", "first", may_number=False) == tmp_path / "runs" / "a"
    with pytest.raises(UserError, match=r"run_name='a': .*exists and nothing is overwritten"):
        rundir.claim(tmp_path / "runs" / "a", "second", may_number=False)
    numbered = [rundir.claim(tmp_path / "runs" / "a", "third", may_number=True).name for _ in range(2)]
    assert numbered == ["a-2", "a-3"]
    assert [(tmp_path / "runs" / name / "config.yaml").read_text() for name in ("a", "a-2")] == ["first", "third"]


def test_a_name_that_a_file_has_is_refused_and_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a run")
    with pytest.raises(UserError, match=r"run_name='file': .*exists"):
        rundir.claim(tmp_path / "file", "", may_number=False)
    (tmp_path / "empty").mkdir()
    assert rundir.claim(tmp_path / "empty", "text", may_number=False) == tmp_path / "empty"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]
    with pytest.raises(UserError, match=r"output_dir: .* cannot be made"):
        rundir.claim(tmp_path / "file" / "below", "", may_number=False)


def test_last_checkpoint_prefers_last_then_the_newest(tmp_path: Path) -> None:
    assert rundir.last_checkpoint(tmp_path / "a") is None
    old = checkpoint(tmp_path, "a", "step-000001.ckpt", 200)
    new = checkpoint(tmp_path, "a", "step-000002.ckpt", 300)
    assert rundir.last_checkpoint(tmp_path / "a") == new
    last = checkpoint(tmp_path, "a", "last.ckpt", 100)
    assert rundir.last_checkpoint(tmp_path / "a") == last
    assert old.exists()


def test_a_damaged_last_checkpoint_gives_way_to_the_newest_whole_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path, "a", "step-000001.ckpt", 100)
    previous = checkpoint(tmp_path, "a", "previous.ckpt", 200)
    last = checkpoint(tmp_path, "a", "last.ckpt", 300)
    content = bytearray(last.read_bytes())
    content[200] ^= 1  # one bit
    last.write_bytes(content)
    assert rundir.last_checkpoint(tmp_path / "a") == previous
    assert f"{last} is damaged: the checksum of its part data is wrong. Going on with {previous}" in (
        capsys.readouterr().err
    )
    for path in last.parent.iterdir():
        path.write_bytes(content[:100])
    with pytest.raises(UserError, match=r"no checkpoint of this run is whole: .*last\.ckpt is trunc.*step-000001"):
        rundir.last_checkpoint(tmp_path / "a")


def test_newest_run_is_by_time_of_writing_not_by_name(tmp_path: Path) -> None:
    assert rundir.newest_run(tmp_path / "nothing") is None
    checkpoint(tmp_path, "a", "last.ckpt", 300)
    checkpoint(tmp_path, "b", "last.ckpt", 200)
    (tmp_path / "c").mkdir()
    (tmp_path / "notes.txt").write_text("no run")
    assert rundir.newest_run(tmp_path) == tmp_path / "a"


def test_links_to_nothing_among_checkpoints_are_passed_over(tmp_path: Path) -> None:
    last = checkpoint(tmp_path, "r", "last.ckpt", 1)
    for run, name in (("r", "best.ckpt"), ("other", "last.ckpt")):
        (tmp_path / run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (tmp_path / run / "checkpoints" / name).symlink_to("gone.ckpt")
    assert rundir.newest_run(tmp_path) == tmp_path / "r"
    assert rundir.last_checkpoint(tmp_path / "r") == last
    assert rundir.last_checkpoint(tmp_path / "other") is None


def test_a_checkpoint_belongs_to_a_run_only_inside_its_folder(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "a", "last.ckpt", 1)
    assert rundir.run_of_checkpoint(path) is None
    (tmp_path / "a" / "config.yaml").write_text("")
    assert rundir.run_of_checkpoint(path) == tmp_path / "a"


def test_children_learn_the_run_and_the_first_process_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "LOCAL_RANK", "SLURM_PROCID", rundir.RUN_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    run = rundir.Run(Path("runs/a"), Path("runs/a/checkpoints/last.ckpt"))
    monkeypatch.setenv(rundir.RUN_VARIABLE, "")
    rundir.announce(run)
    assert rundir.announced() is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert process_rank() == 1
    assert rundir.announced() == run


def test_atomic_file_keeps_the_old_content_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with atomic_open(path) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError), atomic_open(path) as file:
        file.write(b"half of the n" * (1 // 0))
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
