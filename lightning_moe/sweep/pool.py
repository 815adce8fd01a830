"""A pool of ``fit`` commands that run side by side; sweeps and studies train with it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import psutil

from lightning_moe.errors import TrainingDiverged
from lightning_moe.filenames import SUMMARY_FILE
from lightning_moe.processes import die_with_parent, usable_cores
from lightning_moe.runs.folder import RUN_VARIABLE
from lightning_moe.trust import config_fact, is_known

FIT = (sys.executable, "-m", "lightning_moe", "fit")  # the command that trains
RUN_FOLDER_VARIABLE = "LIGHTNING_MOE_SWEEP_RUN"  # marks the processes of a run, so that they are found again
POLL_SECONDS = 0.3  # between two looks at the runs
STOP_SECONDS = 60.0  # for a last checkpoint, between the request to stop and the end by force
#: variables of an outer launcher, which are wrong for the processes of a run
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class PoolRun:
    """One ``fit`` of many.

    Args:
        output_dir: folder of all runs.
        name: name of this run.
    """

    output_dir: Path
    name: str

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.output_dir / self.name

    @property
    def config(self) -> Path:
        """File of the complete configuration, written before the run starts."""
        return self.output_dir / f"{self.name}.yaml"

    @property
    def log(self) -> Path:
        """File of the printed lines."""
        return self.output_dir / f"{self.name}.log"

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.folder / SUMMARY_FILE).is_file()

    def has_own_config(self) -> bool:
        """Return whether its configuration is there and was written by this user: another's may name any code."""
        try:
            return is_known(config_fact(self.config.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError):
            return False

    def last_line(self) -> str:
        """Return the last error line of the log, or else the last line with text."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error:")]
        return (errors or lines or [""])[-1].strip()[:300]


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        kind: kind of the end; ``stopped`` means that `Pool.stop` ended the run before it had finished.
        reason: reason why it diverged or failed, in one line.
    """

    kind: Literal["finished", "diverged", "failed", "stopped"]
    reason: str = ""


Run = TypeVar("Run", bound=PoolRun)


class Pool(Generic[Run]):
    """``fit`` commands in process groups of their own, at most one per slot.

    A run that was killed, or stopped by the end of the ``with`` block, continues from its last checkpoint when it is
    started again. No run outlives this process.

    Args:
        slots: number of runs at the same time, among which the GPUs and cores of this machine are divided.
        environment: further variables of the runs' environment.
    """

    def __init__(self, slots: int, environment: Mapping[str, str] | None = None) -> None:
        self._environment = environment or {}
        self._slots: list[tuple[Run, _Process] | None] = [None] * slots
        self._gpus = visible_gpus()

    def __enter__(self) -> Pool[Run]:
        return self

    def __exit__(self, *exception: object) -> None:
        processes = [slot[1] for slot in self._slots if slot is not None]
        for process in processes:
            process.ask_to_stop()
        for process in processes:
            process.wait_or_kill()

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return None in self._slots

    @property
    def is_empty(self) -> bool:
        """Whether nothing runs."""
        return not any(self._slots)

    def start(self, run: Run, tags: Mapping[str, str], flags: Sequence[str] = ()) -> None:
        """Start a run in a free slot, from its last checkpoint if it has one.

        Args:
            run: run whose configuration is written already.
            tags: tags of its MLflow run.
            flags: further options of ``fit``.
        """
        index = self._slots.index(None)
        command = [*FIT, "--config", str(run.config), "--output_dir", str(run.output_dir), "--run_name", run.name]
        command += ["--ckpt_path", "last", f"--tracking.tags={json.dumps(tags)}", *flags]
        environment = {**slot_environment(index, len(self._slots), self._gpus), **self._environment}
        self._slots[index] = (run, _Process(command, run, environment))

    def poll(self) -> list[tuple[Run, Outcome]]:
        """Return the runs that ended since the last call; their slots are free."""
        ended = []
        for index, slot in enumerate(self._slots):
            if slot is not None and (outcome := slot[1].outcome()) is not None:
                self._slots[index] = None
                ended.append((slot[0], outcome))
        return ended

    def wait(self) -> list[tuple[Run, Outcome]]:
        """Wait until a run ends; return the same as `poll`."""
        while not (ended := self.poll()):
            time.sleep(POLL_SECONDS)
        return ended

    def stop(self, run: Run) -> None:
        """Ask a run to write a checkpoint and end; after a minute it is killed. `poll` returns it when it has ended."""
        for slot in self._slots:
            if slot is not None and slot[0] == run:
                slot[1].ask_to_stop()

    def drop(self, run: Run) -> None:
        """Stop a run and wait for its end, which `poll` does not return."""
        for index, slot in enumerate(self._slots):
            if slot is not None and slot[0] == run:
                slot[1].ask_to_stop()
                slot[1].wait_or_kill()
                self._slots[index] = None


class _Process:
    """The process group of a run. Processes that an earlier start left running are killed first."""

    def __init__(self, command: Sequence[str], run: PoolRun, environment: Mapping[str, str]) -> None:
        _kill_processes_of(run.folder)
        self._run = run
        self._asked = float("inf")
        inherited = {name: value for name, value in os.environ.items() if name not in (RUN_VARIABLE, *_LAUNCHER)}
        with run.log.open("ab") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**inherited, RUN_FOLDER_VARIABLE: str(run.folder.absolute()), **environment},
                start_new_session=True,  # Ctrl-C reaches this process only, which then stops its runs
                preexec_fn=die_with_parent() if sys.platform == "linux" else None,
            )

    def ask_to_stop(self) -> None:
        if self._asked == float("inf"):
            self._asked = time.monotonic()
            self._signal(signal.SIGTERM)

    def outcome(self) -> Outcome | None:
        """Return the outcome, `None` while it runs. A process that does not stop when asked is killed."""
        if time.monotonic() > self._asked + STOP_SECONDS:
            self._signal(signal.SIGKILL)
        code = self._process.poll()
        if code is None:
            return None
        self._signal(signal.SIGKILL)  # a failed rank 0 may leave other ranks running
        if code == 0 and self._run.is_finished:
            return Outcome("finished")
        if self._asked < float("inf"):
            return Outcome("stopped")
        if code == TrainingDiverged.exit_code:
            return Outcome("diverged", self._run.last_line())
        memory = ", out of memory?" if code == -signal.SIGKILL else ""
        how = f"ended by signal {-code}{memory}" if code < 0 else f"exit code {code}"
        return Outcome("failed", f"{how}: {self._run.last_line()}")

    def wait_or_kill(self) -> None:
        """Wait for the end after `ask_to_stop`, and force it if it does not come."""
        try:
            self._process.wait(max(0.0, self._asked + STOP_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _kill_processes_of(run_folder: Path) -> None:
    """Kill the processes of a run that a dead process left running, such as the other ranks of a killed rank 0."""
    folder = str(run_folder.absolute())
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(RUN_FOLDER_VARIABLE) == folder:
                process.kill()


def slot_environment(slot: int, slots: int, gpus: Sequence[str]) -> dict[str, str]:
    """Give one of several runs at the same time its share of the machine.

    Args:
        slot: number of the slot, from 0.
        slots: number of slots.
        gpus: visible GPUs, in the words of ``CUDA_VISIBLE_DEVICES``.

    Returns:
        ``CUDA_VISIBLE_DEVICES`` with equal parts of the GPUs (one of them, shared, if there are fewer than slots), and
        ``OMP_NUM_THREADS`` if the environment has none.
    """
    environment = {}
    if slots > 1 and gpus:
        share = len(gpus) // slots
        mine = gpus[slot * share : (slot + 1) * share] if share else [gpus[slot % len(gpus)]]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    if slots > 1 and "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, usable_cores() // slots))
    return environment


def visible_gpus() -> list[str]:
    """Name the GPUs of this machine that a process may use, without touching them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu.strip()]
    return [str(number) for number in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]


def say(text: str) -> None:
    """Print a line and flush, so that a log file shows it at once."""
    print(text, flush=True)
