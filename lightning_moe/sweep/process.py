"""One ``fit`` in a process group of its own, which does not outlive the sweep."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from lightning_moe.processes import die_with_parent
from lightning_moe.runs.folder import RUN_VARIABLE

RUN_FOLDER_VARIABLE = "LIGHTNING_MOE_SWEEP_RUN"  # by which the processes of a run are found again
STOP_SECONDS = 60.0  # for a last checkpoint, between the request to stop and the end by force
#: what an outer launcher says of this process must not reach a trial's own processes
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


class FitProcess:
    """A started command.

    Args:
        command: program and arguments.
        run_folder: of the run; any process that still works on it is killed first.
        log: file that everything it prints is appended to.
        environment: variables beside this process's own.
    """

    def __init__(self, command: Sequence[str], run_folder: Path, log: Path, environment: Mapping[str, str]) -> None:
        kill_processes_of(run_folder)
        self._asked = float("inf")
        inherited = {name: value for name, value in os.environ.items() if name not in (RUN_VARIABLE, *_LAUNCHER)}
        with log.open("ab") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**inherited, RUN_FOLDER_VARIABLE: str(run_folder.absolute()), **environment},
                start_new_session=True,  # Ctrl-C is the sweep's business
                preexec_fn=die_with_parent() if sys.platform == "linux" else None,
            )

    def ask_to_stop(self) -> None:
        """SIGTERM for all its processes, once."""
        if self._asked == float("inf"):
            self._asked = time.monotonic()
            self._signal(signal.SIGTERM)

    def exit_code(self) -> int | None:
        """Negative for a signal; null while it runs. One that does not stop when asked is killed."""
        if time.monotonic() > self._asked + STOP_SECONDS:
            self._signal(signal.SIGKILL)
        code = self._process.poll()
        if code is not None:
            self._signal(signal.SIGKILL)  # a failed rank 0 may leave others behind
        return code

    def wait_or_kill(self) -> None:
        """Wait for its end after `ask_to_stop`, and end it by force where it does not come."""
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


def kill_processes_of(run_folder: Path) -> None:
    """Kill what an ended sweep left running for a run, such as the other ranks of a killed rank 0."""
    folder = str(run_folder.absolute())
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(RUN_FOLDER_VARIABLE) == folder:
                process.kill()


def slot_environment(slot: int, slots: int, gpus: Sequence[str]) -> dict[str, str]:
    """Its share of the machine for one of several commands at the same time.

    Args:
        slot: number of the command, from 0.
        slots: how many there are.
        gpus: the visible GPUs, as ``CUDA_VISIBLE_DEVICES`` names them.

    Returns:
        ``CUDA_VISIBLE_DEVICES`` with equal parts of the GPUs (one of them, shared, where there are fewer than slots),
        and ``OMP_NUM_THREADS`` where the environment has none.
    """
    environment = {}
    if slots > 1 and gpus:
        share = len(gpus) // slots
        mine = gpus[slot * share : (slot + 1) * share] if share else [gpus[slot % len(gpus)]]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    if slots > 1 and "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // slots))
    return environment


def visible_gpus() -> list[str]:
    """The GPUs of this machine that a process may use, without touching them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu.strip()]
    return [str(number) for number in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]
