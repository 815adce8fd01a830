"""One command line in a forked process: isolated, limited in time and memory, and with everything it says."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import multiprocessing.process
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

PACKAGE = str(Path(__file__).parents[2] / "lightning_moe")
MORE_MEMORY = 3 << 30  # bytes beyond what the process has when it is forked
LARGEST_FILE = 256 << 20
MANY_STEPS = 4  # a run that does as many has nothing left to refuse
MANY_PROCESSES = 64
DOCUMENTS = 60  # of the large corpora


class Accepted(BaseException):
    """Ends a command that took its input and goes on to work that may be long: other processes, more steps."""


@dataclass(frozen=True)
class Outcome:
    """How a command line ended.

    Args:
        code: exit code; `None` if it did not end by itself.
        stdout: what it printed.
        stderr: what it printed as errors.
        exception: class of an exception that left `main`; `None` for none.
        place: innermost function of the package where that happened, or where it hung.
        accepted: what it went on to do, where it was stopped; `None` if it ended.
        signal: number of the signal that killed it; `None` for none.
        seconds: time of computing.
        hung: whether the time was over.
    """

    code: int | None
    stdout: str
    stderr: str
    exception: str | None = None
    place: str | None = None
    accepted: str | None = None
    signal: int | None = None
    seconds: float = 0.0
    hung: bool = False


def run_in_child(argv: Sequence[str], folder: Path, environment: dict[str, str], seconds: float) -> Outcome:
    """Run ``python -m lightning_moe *argv`` in a fork of this process, which has imported everything.

    Args:
        argv: arguments.
        folder: working directory.
        environment: variables that replace those of this process.
        seconds: time of computing after which it is killed.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        files = {name: Path(temporary, name) for name in ("stdout", "stderr", "report", "stacks")}
        child = os.fork()
        if child == 0:
            _run(argv, folder, environment, files)
        status, took, hung = _wait(child, seconds)
        texts = {
            name: path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            for name, path in files.items()
        }
    report: dict[str, Any] = json.loads(texts["report"] or "{}")
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return Outcome(
        code=report.get("code"),
        stdout=texts["stdout"],
        stderr=texts["stderr"],
        exception=report.get("exception"),
        place=_place_of_stack(texts["stacks"]) if texts["stacks"] else report.get("place"),
        accepted=report.get("accepted"),
        signal=number,
        seconds=took,
        hung=hung,
    )


def _wait(child: int, seconds: float) -> tuple[int, float, bool]:
    """Wait for a process and return its status, its seconds of computing, and whether it had to be killed.

    It is, when its time of computing is over, or when it waits for something and nothing comes. A machine with other
    work does not count.
    """
    descriptor, began, hung = os.pidfd_open(child), time.monotonic(), False
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    busy, since = 0.0, began
    try:
        while not poll.poll(200):
            computed, runs = _progress(child)
            if computed > busy or runs:
                busy, since = computed, time.monotonic()
            waited = time.monotonic() - since
            if busy > seconds or waited > min(seconds, 10) or time.monotonic() - began > 20 * seconds:
                hung = True
                os.kill(child, signal.SIGUSR2)  # writes where it is
                poll.poll(2000 if waited > 1 else 500)
                os.kill(child, signal.SIGKILL)
                break
        _, status, usage = os.wait4(child, 0)
    finally:
        os.close(descriptor)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # what it may have started
    return status, usage.ru_utime + usage.ru_stime, hung


def _progress(process: int) -> tuple[float, bool]:
    """Return the seconds of computing of a process, and whether it computes now."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0] == "R"


def _run(argv: Sequence[str], folder: Path, environment: dict[str, str], files: dict[str, Path]) -> NoReturn:
    report: dict[str, Any] = {}
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        _redirect(files)
        _limit()
        _stop_long_work()
        stacks = files["stacks"].open("w")
        faulthandler.enable(stacks)
        faulthandler.register(signal.SIGUSR2, stacks, all_threads=True)
        try:
            from lightning_moe.cli import last_resort, main

            explain = last_resort.explain_unexpected
            last_resort.explain_unexpected = lambda error: _unless_memory(error, explain)
            report["code"] = main(list(argv))
        except SystemExit as exit_:
            code = exit_.code
            if code is not None and not isinstance(code, int):
                print(code, file=sys.stderr)
                code = 1
            report["code"] = code or 0
        except Accepted as accepted:
            report["accepted"] = str(accepted)
        except BaseException as error:
            report["exception"] = type(error).__name__
            report["place"] = _place(error)
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        files["report"].write_text(json.dumps(report))
    finally:
        os._exit(0)


def _unless_memory(error: Exception, explain: Callable[[Exception], int]) -> int:
    """Let the last resort of the command line explain that memory ran out, and show every other error to the judge."""
    from lightning_moe.cli.last_resort import is_out_of_memory

    if is_out_of_memory(error):
        return explain(error)
    raise error


def _redirect(files: dict[str, Path]) -> None:
    """Give the process a standard input that is empty, and files as outputs, as Python opens them by itself."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        os.dup2(os.open(files[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        stream = io.TextIOWrapper(
            open(number, "wb", buffering=0, closefd=False),  # noqa: SIM115 - until the process ends
            encoding="utf-8",
            errors=errors,
            write_through=True,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MORE_MEMORY
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (memory, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _stop_long_work() -> None:
    """Stop where a command would start processes, use the network, or train for long: its input was accepted."""
    from lightning_moe.data.corpora import Corpus, SitePackages, StandardLibrary
    from lightning_moe.module import LanguageModel
    from lightning_moe.report import figures

    figures.RESOLUTION = 10  # most of the time of `analyze`

    def beginning_of(corpus: type[Corpus]) -> None:
        documents = corpus.documents
        corpus.documents = lambda self: islice(documents(self), DOCUMENTS)  # type: ignore[method-assign]

    beginning_of(StandardLibrary)
    beginning_of(SitePackages)
    real = subprocess.Popen.__init__

    def start(self: Any, args: Any, *more: Any, **options: Any) -> None:
        words = [str(args)] if isinstance(args, str) else [str(word) for word in args]
        if words[0] == "git":
            real(self, args, *more, **options)
            return
        self.returncode = 0  # its destructor asks
        self._child_created = False
        world = int((options.get("env") or os.environ).get("WORLD_SIZE", "1"))
        how_many = f"one of {world} processes" if world > MANY_PROCESSES else "a process"
        raise Accepted(f"starts {how_many}: {' '.join(words)[:200]}")

    def start_worker(self: Any) -> None:
        raise Accepted(f"starts a worker: {self.name}")

    def refuse(*args: Any, **options: Any) -> NoReturn:
        raise ConnectionRefusedError("no network in this test")

    subprocess.Popen.__init__ = start  # type: ignore[method-assign]
    multiprocessing.process.BaseProcess.start = start_worker  # type: ignore[method-assign]
    socket.socket.connect = refuse  # type: ignore[method-assign]
    socket.getaddrinfo = refuse
    steps = 0
    training_step = LanguageModel.training_step

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > MANY_STEPS:
            raise Accepted("trains")
        return training_step(self, *args, **options)

    LanguageModel.training_step = counted  # type: ignore[method-assign]


def _place(error: BaseException) -> str:
    """Return the innermost function of the package in an exception's traceback, or of what caused it."""
    found = None
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith(PACKAGE):
            found = f"{frame.filename[len(PACKAGE) + 1 :]}:{frame.lineno} {frame.name}"
    return found or "outside"


def _place_of_stack(stacks: str) -> str:
    """Return the innermost function of the package in what faulthandler wrote; of another one if there is none."""
    frames = re.findall(r'File "(.+)", line (\d+) in (.+)', stacks)
    own = [frame for frame in frames if frame[0].startswith(PACKAGE)]
    if not own:
        return "outside: " + " < ".join(f"{Path(path).name}:{line} {name}" for path, line, name in frames[:3])
    path, line, name = own[0]
    return f"{path[len(PACKAGE) + 1 :]}:{line} {name}"
