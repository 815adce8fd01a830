"""A full disk, a damaged checkpoint, a damaged token file: what was good stays, and the message says what and where."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
from fault_runs import Workplace


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A file system of its own in ``folder``; false where this process may not mount one."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = sys.platform == "linux" and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


SIX_STEPS = {"point": "after a checkpoint's name", "call": 2}  # the schedule of a shorter run would be another


@pytest.mark.parametrize(
    ("layout", "limited"),
    [
        pytest.param("1 process", False, marks=pytest.mark.slow),
        pytest.param("1 process", True, marks=pytest.mark.faults),
        pytest.param("DDP × 2", False, marks=pytest.mark.faults),
        pytest.param("FSDP2 × 2, sharded checkpoint", False, marks=pytest.mark.faults),
        pytest.param("FSDP2 × 2, sharded checkpoint", True, marks=pytest.mark.faults),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(
    layout: str, limited: bool, workplace: Callable[[str], Workplace]
) -> None:
    """``limited``: by the largest size of a file that the system allows, as where no file system can be mounted."""
    place = workplace(layout)
    with nullcontext(False) if limited else small_disk(place.folder / "disk", 16) as mounted:
        shutil.rmtree(place.folder / "disk/part", ignore_errors=True)
        run = ("--run_name=part", "--output_dir=disk", "--ckpt_path=last", "--checkpoint.keep_all=false")
        assert place.fit(*run, fault=SIX_STEPS).code == -9
        last = place.folder / "disk/part/checkpoints/last.ckpt"
        before, size = files(last), sum(map(len, files(last).values()))
        filler, limit = place.folder / "disk/filler", None
        if mounted:
            filler.write_bytes(bytes(shutil.disk_usage(filler.parent).free - size // 2))
        else:
            limit = at_most(size // 4)
        ended = place.start(*run, limit=limit).wait_for_all()
        assert ended.code == 4, ended.output
        assert f"error: the checkpoint of step 9 cannot be written to {last.parent}: " in ended.output
        reasons = ["No space left on device" if mounted else "File too large", "a shard cannot be written in full"]
        assert any(reason in ended.output for reason in reasons[: 1 + last.is_dir()])
        assert f"{last} is whole and stays. Make room, then continue with --ckpt_path last" in ended.output
        assert "Traceback" not in ended.output
        assert files(last) == before
        assert not list(last.parent.glob(".*"))

        filler.unlink(missing_ok=True)
        place.check_continues("part", "--checkpoint.keep_all=false", output_dir="disk")


@pytest.mark.faults
def test_a_disk_that_takes_nothing_more(workplace: Callable[[str], Workplace]) -> None:
    """Neither a line of metrics, nor a figure, nor a checkpoint; and then not even the start of a run."""
    alone = workplace("1 process")
    with small_disk(alone.folder / "disk", 16) as mounted:
        assert mounted, "needs the right to mount a file system"
        filler = alone.folder / "disk/filler"
        run = ("--run_name=part", "--output_dir=disk", "--ckpt_path=last", "--checkpoint.keep_all=false")
        # after a validation's first batch: a line of metrics, a figure and a checkpoint are to come
        process = alone.start(*run, fault={"point": "validation", "call": 1, "effect": "hold"})
        process.wait_for_fault()
        fill(filler)
        process.go_on()
        ended = process.wait()
        assert ended.code == 4, ended.output
        assert "training goes on without a record" in ended.output
        assert "error: the checkpoint of step 6 cannot be written to" in ended.output
        assert "Traceback" not in ended.output

        for name in ("part", "new"):
            ended = alone.fit(f"--run_name={name}", "--output_dir=disk", "--ckpt_path=last")
            assert ended.code == 4, ended.output
            path = alone.folder / f"disk/{name}/config.yaml"
            assert f"error: {path} cannot be written: No space left on device" in ended.output
            assert "Traceback" not in ended.output

        filler.unlink()
        alone.check_continues("part", "--checkpoint.keep_all=false", output_dir="disk")


def fill(filler: Path) -> None:
    """Leave not a byte of a file system."""
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path.iterdir() if path.is_dir() else [path])}


def at_most(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
def test_a_damaged_last_checkpoint_gives_way_to_the_previous(workplace: Callable[[str], Workplace]) -> None:
    alone = workplace("1 process")
    run = ("--run_name=damaged", "--ckpt_path=last", "--checkpoint.keep_all=false")
    assert alone.fit(*run, fault=SIX_STEPS).code == -9
    last = alone.folder / "runs/damaged/checkpoints/last.ckpt"
    flip(last)
    content = last.read_bytes()

    # killed before it has written a checkpoint of its own: the good one must still be there
    ended = alone.fit(*run, fault={"point": "before a checkpoint's name", "call": 1})
    assert ended.code == -9, ended.output
    assert "warning: runs/damaged/checkpoints/last.ckpt is damaged: the checksum" in ended.output
    assert "Going on with runs/damaged/checkpoints/previous.ckpt" in ended.output
    assert last.with_name("last.ckpt.set-aside").read_bytes() == content
    alone.check_continues("damaged", "--checkpoint.keep_all=false")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


#: how the second process's shard is damaged, and what is said of it
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flip": (flip, "damaged: __1_0.distcp does not match its checksum: offsets 0 to"),
    "truncate": (lambda shard: os.truncate(shard, 1000), "damaged: __1_0.distcp is 1000 bytes long, not"),
    "delete": (Path.unlink, "damaged: __1_0.distcp is missing"),
}


@pytest.mark.faults
def test_a_damaged_shard_is_named_and_its_checkpoint_gives_way(workplace: Callable[[str], Workplace]) -> None:
    pair = workplace("FSDP2 × 2, sharded checkpoint")
    run = ("--run_name=shards", "--ckpt_path=last", "--checkpoint.keep_all=false")
    assert pair.fit(*run, fault=SIX_STEPS).code == -9
    folder = pair.folder / "runs/shards/checkpoints"
    whole, last = pair.folder / "whole shards", folder / "last.ckpt"
    shutil.copytree(folder, whole)
    for damage, (how, why) in DAMAGES.items():
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        how(last / "__1_0.distcp")
        damaged = files(last)

        named = pair.fit("--run_name=other", f"--ckpt_path={last}")
        assert named.code == 2, named.output
        assert why in named.output
        assert "Traceback" not in named.output
        # killed before it has written a checkpoint of its own: the good one must still be there
        ended = pair.fit(*run, fault={"point": "before a checkpoint's name", "call": 1})
        assert ended.code == -9, (damage, ended.output)
        assert f"warning: runs/shards/checkpoints/last.ckpt is {why}" in ended.output
        assert "Going on with runs/shards/checkpoints/previous.ckpt" in ended.output
        assert files(folder / "last.ckpt.set-aside") == damaged
    pair.check_continues("shards", "--checkpoint.keep_all=false")


@pytest.mark.faults
@pytest.mark.parametrize("layout", ["1 process", "DDP × 2"])
def test_a_bad_token_is_found_before_training_and_its_file_named(
    layout: str, workplace: Callable[[str], Workplace]
) -> None:
    place = workplace(layout)
    run = ("--run_name=token", "--ckpt_path=last")
    assert place.fit(*run, fault=SIX_STEPS, cache="bad cache").code == -9
    (path,) = (place.folder / "bad cache").glob("*/train-*.tokens")
    tokens = np.memmap(path, dtype="<u2", mode="r+")
    tokens[100] = 60000  # the vocabulary has 300
    tokens.flush()
    before = files(place.folder / "runs/token/checkpoints")
    ended = place.start(*run, cache="bad cache").wait_for_all()
    assert ended.code == 2, ended.output
    assert f"{path} holds token 60000 at offset 200, but the vocabulary has 300" in ended.output
    assert "Traceback" not in ended.output
    assert files(place.folder / "runs/token/checkpoints") == before
