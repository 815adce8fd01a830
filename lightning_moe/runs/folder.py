"""The run's folder ``<output_dir>/<run_name>/``: its name, its checkpoints, and how all processes agree on it."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lightning_moe.atomic import atomic_folder
from lightning_moe.checkpoints.integrity import damage
from lightning_moe.config.request import Request
from lightning_moe.errors import UserError
from lightning_moe.filenames import CHECKPOINT_FOLDER, CONFIG_FILE, JOURNAL_FILE, LAST_CHECKPOINT
from lightning_moe.processes import dies_with, process_rank

RUN_VARIABLE = "LIGHTNING_MOE_RUN"  # how the first process tells its children the run, see `announce`


@dataclass(frozen=True)
class Run:
    """Where a run lives and what it starts from.

    Args:
        folder: ``<output_dir>/<run_name>``.
        ckpt_path: checkpoint to load; `None` starts from scratch.
        is_new: whether this process made the folder.
        made: folders above it that this process made for it, deepest first.
    """

    folder: Path
    ckpt_path: Path | None = None
    is_new: bool = False
    made: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINT_FOLDER


def announce(run: Run) -> None:
    """Leave the run in the environment for child processes, whose generated names would have another time."""
    ckpt_path = None if run.ckpt_path is None else str(run.ckpt_path)
    made = [str(folder.absolute()) for folder in run.made]
    value = {"folder": str(run.folder), "ckpt_path": ckpt_path, "process": os.getpid(), "is_new": run.is_new}
    os.environ[RUN_VARIABLE] = json.dumps({**value, "made": made})


def drop_unless_begun() -> None:
    """Remove the folder of a new run that ended before its record began, so that its name is free again."""
    value = os.environ.get(RUN_VARIABLE)
    if process_rank() != 0 or not value:
        return
    run = json.loads(value)
    folder = Path(run["folder"])
    if run["is_new"] and not (folder / JOURNAL_FILE).exists():
        with suppress(OSError):
            (folder / CONFIG_FILE).unlink(missing_ok=True)
            folder.rmdir()
            for above in run["made"]:
                Path(above).rmdir()


def announced() -> Run | None:
    """Return the run of the process that started this one; `None` in the first one and under other launchers."""
    value = os.environ.get(RUN_VARIABLE)
    if process_rank() == 0 or not value:
        return None
    run = json.loads(value)
    return Run(Path(run["folder"]), None if run["ckpt_path"] is None else Path(run["ckpt_path"]))


@contextmanager
def ends_with_first_process() -> Iterator[None]:
    """Inside the block, end a process that `announce` reached as soon as the process that started it ends.

    Left alone, it would wait half an hour for that one in a collective operation.
    """
    if announced() is None:
        yield
        return
    with dies_with(json.loads(os.environ[RUN_VARIABLE])["process"]):
        yield


def settle(request: Request, routing: str, seed: str, config: str) -> Run:
    """Find or make the folder of a run, and `announce` it to the processes that this one will start.

    All processes of a run get the same answer.

    Args:
        request: request of the command line.
        routing: short name of the routing rule, for a generated name.
        seed: random seed, for a generated name.
        config: complete configuration, for the folder of a new run.

    Raises:
        UserError: the folder of a new run exists already, or cannot be made.
    """
    run = announced()
    if run is None:
        folder, is_new = request.folder, request.folder is None
        made: tuple[Path, ...] = ()
        if folder is None:
            folder = request.output_dir / (request.run_name or generated_name(routing, seed))
            if process_rank() == 0:
                made = tuple(above for above in folder.parents if not above.exists())
                folder = claim(folder, config, may_number=request.run_name is None)
        run = Run(folder, request.ckpt_path, is_new, made)
    if process_rank() == 0:  # under torchrun or SLURM the others are not its children
        announce(run)
    return run


def routing_name(class_path: str | None) -> str:
    """Return ``expert_threshold`` for the class path of ExpertThreshold; ``dense`` for `None`."""
    if class_path is None:
        return "dense"
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", class_path.rpartition(".")[2]).lower()


def generated_name(routing: str, seed: str) -> str:
    """Return ``<routing>-s<seed>-<UTC time>``, for example ``expert_threshold-s1-20260317T120000Z``."""
    return f"{routing}-s{seed}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


def claim(folder: Path, config: str, may_number: bool) -> Path:
    """Make the folder of a new run, which no other run has, with its configuration.

    The folder appears with the file in it. So a run that is killed at any moment after this can be continued by name.

    Args:
        folder: wanted folder ``<output_dir>/<run_name>``.
        config: content of ``config.yaml``.
        may_number: whether ``name-2``, ``name-3``, … will do if the name is taken (two runs started in one second).

    Raises:
        UserError: the folder exists and is not empty.
    """
    attempt, free = 1, folder
    while True:
        try:
            with atomic_folder(free) as temporary:
                (temporary / CONFIG_FILE).write_text(config, encoding="utf-8")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a full disk has an exit code of its own
                raise OSError(error.errno, os.strerror(error.errno), str(free.absolute() / CONFIG_FILE)) from error
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) or not free.exists():
                raise UserError(f"output_dir: {free} cannot be made: {error}") from error
            if not may_number:
                raise UserError(
                    f"run_name={folder.name!r}: {folder} exists and nothing is overwritten; continue that run with "
                    f"--ckpt_path last --run_name {folder.name}, or choose another run_name"
                ) from None
            attempt += 1
            free = folder.with_name(f"{folder.name}-{attempt}")
        else:
            return free


def run_of_checkpoint(ckpt_path: Path) -> Path | None:
    """Return the folder of the run that wrote this checkpoint; `None` for a file outside of a run's folder."""
    folder = ckpt_path.parent.parent
    inside = ckpt_path.parent.name == CHECKPOINT_FOLDER and (folder / CONFIG_FILE).is_file()
    return folder if inside else None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run: ``last.ckpt``, then the others, newest first. Links to nothing are left out."""
    times = _times((folder / CHECKPOINT_FOLDER).glob("*.ckpt"))
    return sorted(times, key=lambda path: (path.name == LAST_CHECKPOINT, times[path]), reverse=True)


def _times(paths: Iterable[Path]) -> dict[Path, float]:
    """Return when each path was written (mtime); a path that leads nowhere, or was just removed, is left out."""
    times = {}
    for path in paths:
        with suppress(OSError):
            times[path] = path.stat().st_mtime
    return times


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run; `None` for a run without any checkpoint.

    Damaged ones are left out, with a warning.

    Raises:
        UserError: all are damaged.
    """
    damaged: list[str] = []
    for path in checkpoints(folder):
        problem = damage(path)
        if problem is None:
            if damaged and process_rank() == 0:
                print(f"warning: {'; '.join(damaged)}. Going on with {path}", file=sys.stderr)
            return path
        damaged.append(f"{path} is {problem}")
    if damaged:
        raise UserError(f"ckpt_path='last': no checkpoint of this run is whole: {'; '.join(damaged)}")
    return None


def newest_run(output_dir: Path) -> Path | None:
    """Return the run under ``output_dir`` that wrote a checkpoint most recently; `None` without any."""
    folders = output_dir.iterdir() if output_dir.is_dir() else ()
    times = {folder: max(written) for folder in folders if (written := _times(checkpoints(folder)).values())}
    return max(times, key=times.__getitem__, default=None)
