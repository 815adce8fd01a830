"""When checkpoints are written, how their files change names, and that none is read twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_run import Command

from lightning_moe.training.checkpoint_files import PENDING, AtomicCheckpointIO, publish, set_aside_a_later_one


def steps(name: str) -> int:
    return int(torch.load(f"runs/a/checkpoints/{name}.ckpt", weights_only=True)["global_step"])


@pytest.mark.parametrize(
    ("flags", "previous"),
    [
        (["--checkpoint.every_n_train_steps=3"], 3),
        (["--checkpoint.every_n_train_steps=0"], None),
        (["--checkpoint.every_n_train_steps=null", "--checkpoint.train_time_interval=0:00:00"], 4),
        (["--checkpoint.every_n_train_steps=null", "--checkpoint.train_time_interval=1:00:00"], None),
    ],
)
def test_intervals_of_steps_and_of_time(
    flags: list[str], previous: int | None, command: Command, workplace: Path
) -> None:
    code, _, err = command("fit", "--config=small", "--run_name=a", "--trainer.max_steps=5", *flags)
    assert code == 0, err
    assert steps("last") == 5
    names = {path.name for path in (workplace / "runs/a/checkpoints").iterdir()}
    assert names == ({"last.ckpt"} if previous is None else {"last.ckpt", "previous.ckpt"})
    assert previous is None or steps("previous") == previous


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--checkpoint.every_n_train_steps=-1"],
            "checkpoint.every_n_train_steps=-1 (the command line): must be at least 0",
        ),
        (["--checkpoint.every_n_train_steps=null"], "give one, and null for the other"),
        (["--checkpoint.train_time_interval=0:01:00"], "give one, and null for the other"),
    ],
)
def test_intervals_that_mean_nothing(flags: list[str], message: str, command: Command) -> None:
    code, _, err = command("fit", "--config=small", *flags)
    assert code == 2
    assert message in err


def test_a_debugging_run_writes_no_checkpoint(command: Command, workplace: Path) -> None:
    assert command("fit", "--config=small", "--run_name=a", "--trainer.fast_dev_run=2")[0] == 0
    assert not list(workplace.glob("runs/**/*.ckpt"))


def test_a_checkpoint_is_read_once(command: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--config=small", "--run_name=a")
    assert command("fit", *small, "--trainer.max_steps=2")[0] == 0
    original, read = torch.load, []

    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(str(file))
        return original(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    for name in ("fit", "validate", "predict"):
        read.clear()
        code, _, err = command(name, *small, "--ckpt_path=last", "--trainer.max_steps=3")
        assert code == 0, err
        assert read == ["runs/a/checkpoints/last.ckpt"], name


def test_content_that_was_read_is_handed_out_once_and_not_as_a_mapped_file(tmp_path: Path) -> None:
    path, other = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    content = {"state_dict": {"w": torch.arange(3.0)}, "optimizer_states": [{"state": {0: (torch.ones(2), 1)}}]}
    for file in (path, other):
        AtomicCheckpointIO().save_checkpoint(content, file)
    mapped = torch.load(path, weights_only=True, mmap=True)
    mapped["told"] = "apart"
    assert "told" not in AtomicCheckpointIO(path, mapped).load_checkpoint(other)
    reader = AtomicCheckpointIO(path, mapped)
    first, second = reader.load_checkpoint(str(path)), reader.load_checkpoint(path)
    assert (first.pop("told"), "told" in second) == ("apart", False)
    for found in (first, second):
        assert torch.equal(found["state_dict"]["w"], content["state_dict"]["w"])
        tensor, number = found["optimizer_states"][0]["state"][0]
        assert (tensor.tolist(), number) == ([1.0, 1.0], 1)
    assert (
        first["optimizer_states"][0]["state"][0][0].data_ptr()
        != mapped["optimizer_states"][0]["state"][0][0].data_ptr()
    )


def write(path: Path, content: str, as_folder: bool) -> None:
    if as_folder:
        path.mkdir()
        path = path / "part"
    path.write_text(content)


def read(path: Path) -> str:
    return (path / "part" if path.is_dir() else path).read_text()


@pytest.mark.parametrize(
    "kinds", [(False, False, False), (True, True, True), (True, False, True), (False, True, False)]
)
def test_a_pending_checkpoint_becomes_the_last_and_the_last_the_previous(
    kinds: tuple[bool, bool, bool], tmp_path: Path
) -> None:
    for step, as_folder in enumerate(kinds):
        write(tmp_path / PENDING, f"step {step}", as_folder)
        publish(tmp_path, step, keep_all=True)
        assert read(tmp_path / "last.ckpt") == read(tmp_path / f"step-{step:06d}.ckpt") == f"step {step}"
        if step:
            assert read(tmp_path / "previous.ckpt") == f"step {step - 1}"
    kept = {f"step-{step:06d}.ckpt" for step in range(3)}
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "previous.ckpt", *kept}


def test_a_last_checkpoint_is_set_aside_only_for_an_older_one_of_its_run(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    for start in (None, last, Path("elsewhere/previous.ckpt")):
        last.write_text("newer")
        set_aside_a_later_one(tmp_path, start)
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    for _ in range(2):  # the second replaces the first
        last.write_text("newer")
        set_aside_a_later_one(tmp_path, tmp_path / "previous.ckpt")
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt.set-aside"]
