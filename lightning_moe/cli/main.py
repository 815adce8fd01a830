"""The table of commands, and how their errors become messages and exit codes."""

from __future__ import annotations

import errno
import os
import platform
import select
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version

from lightning_moe import __version__
from lightning_moe.bounds import check_text, shown
from lightning_moe.errors import CheckpointNotWritten, RunEnded, RunStopped, UserError, did_you_mean
from lightning_moe.processes import drop_stale_ranks, process_rank, repair_streams

Runner = Callable[[str, list[str]], None]

DEBUG_VARIABLE = "LIGHTNING_MOE_DEBUG"
#: what gloo and NCCL say when another process has died
LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: a path that somebody gave, and that can be put right
WRONG_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Command:
    """One row of the table.

    Args:
        module: module with ``run(command: str, args: list[str]) -> None``, imported when the command runs.
        summary: line that ``--help`` shows.
    """

    module: str
    summary: str


COMMANDS = {
    "fit": Command("lightning_moe.cli.experiment", "train a model; without arguments, the quickstart experiment"),
    "validate": Command("lightning_moe.cli.experiment", "score a checkpoint on the validation text"),
    "test": Command("lightning_moe.cli.experiment", "the same as validate: no text is kept apart for tests"),
    "predict": Command("lightning_moe.cli.experiment", "run a checkpoint over the prediction text"),
    "prepare": Command("lightning_moe.cli.prepare", "tokenize a corpus once, in parallel; fit then finds it"),
    "analyze": Command("lightning_moe.cli.analyze", "report what the routers of checkpoints do with text"),
    "generate": Command("lightning_moe.cli.generate", "continue texts with a checkpoint"),
    "replay": Command("lightning_moe.cli.replay", "score a recorded generation, routed freely and as recorded"),
    "audit": Command("lightning_moe.cli.audit", "check that a checkpoint's routing and output are causal"),
    "calibrate": Command(
        "lightning_moe.cli.calibrate", "set a model's thresholds from text, for any number of experts per token"
    ),
    "dial": Command("lightning_moe.cli.dial", "show a released model's loss against its mean experts per token"),
    "convert": Command("lightning_moe.cli.convert", "write a checkpoint as one file, or as safetensors"),
    "export": Command("lightning_moe.cli.export", "write a checkpoint as a folder for transformers"),
    "plan": Command("lightning_moe.cli.plan", "show what a run will take: parameters, FLOPs, memory, time and cost"),
    "sweep": Command("lightning_moe.cli.sweep", "run many trials over a search space, with Optuna"),
    "compare": Command("lightning_moe.cli.compare", "compare finished runs, with intervals over seeds"),
    "study": Command("lightning_moe.cli.study", "tune, train and compare several methods over seeds; write one page"),
    "ui": Command("lightning_moe.cli.ui", "open MLflow's pages on the runs of this folder"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code, one of those in docs/running.md.

    Every error becomes one line on stderr; the traceback of one that is not expected goes to a file (`last_resort`).
    With the environment variable ``LIGHTNING_MOE_DEBUG=1`` errors keep their traceback. When nobody reads the output
    any more (``| head``), the command ends silently.

    Args:
        argv: arguments after ``python -m lightning_moe``; `None` reads ``sys.argv``.
    """
    repair_streams()
    drop_stale_ranks()
    args = list(sys.argv[1:] if argv is None else argv)
    return report_errors(lambda: _dispatch([_checked(arg) for arg in args]))


def report_errors(action: Callable[[], None]) -> int:
    """Run a command and return its exit code; `main` says what becomes of errors."""
    try:
        try:
            code = _exit_code(action)
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return code
    except BrokenPipeError as error:
        if not _reader_is_gone():
            if os.environ.get(DEBUG_VARIABLE):
                raise
            return _explain(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 128 + signal.SIGPIPE


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(_help())
    elif args[0] == "--version":
        print(_version())
    else:
        _find(args[0])(args[0], args[1:])


def _exit_code(action: Callable[[], None]) -> int:
    try:
        action()
    except UserError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        rank = process_rank()
        print(f"{f'[rank {rank}] ' if rank else ''}error: {error}", file=sys.stderr)
        return 2
    except RunEnded as end:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        if process_rank() == 0:
            print(f"{'' if isinstance(end, RunStopped) else 'error: '}{end}", file=sys.stderr)
        # All ranks end like this one, and rank 0 alone says so: exit codes of the others would make launchers kill it
        # while it still sends the end of the run to MLflow. torchrun's agents need the code of every process.
        return end.exit_code if process_rank() == 0 or "TORCHELASTIC_RUN_ID" in os.environ else 0
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        return _explain(error)
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):  # Lightning turns a Ctrl-C into exit code 1
            return _interrupted()
        raise
    return 0


def _checked(argument: str) -> str:
    """Return an argument that is text and, as ``--flag=value``, has a value; argparse takes ``--flag=--`` as a list."""
    if argument.startswith("--") and argument.endswith("=--"):
        raise UserError(f"{argument.removesuffix('=--')}: its value is '--'; give another one")
    return check_text(argument, "argument")


def _explain(error: Exception) -> int:
    """Print one line about an error that is none of `errors`, and return the exit code."""
    if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PROCESS):
        reason = "another process of this run died; its own message gives the reason"
        print(f"[rank {process_rank()}] Stopping because {reason}.", file=sys.stderr)
        return 1
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        print(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}", file=sys.stderr)
        return CheckpointNotWritten.exit_code
    if isinstance(error, OSError) and error.errno in WRONG_PATH and isinstance(error.filename, str):
        print(f"error: {shown(error.filename)}: {error.strerror}", file=sys.stderr)
        return 2
    from lightning_moe.cli.last_resort import explain_unexpected

    return explain_unexpected(error)


def _find(name: str) -> Runner:
    command = COMMANDS.get(name)
    if command is None:
        raise UserError(f"unknown command {name!r}: {did_you_mean(name, COMMANDS, 'the commands are')}")
    run: Runner = import_module(command.module).run
    return run


def _reader_is_gone() -> bool:
    """Return whether stdout or stderr is a pipe without a reader."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # not a file of the system
            poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return 130


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: python -m lightning_moe <command> [options]\n\n"
        f"commands:\n{rows}\n\n"
        "options:\n"
        "  --help     this text; after a command, the options of that command\n"
        "  --version  versions of lightning_moe, torch, lightning and Python\n\n"
        f"{DEBUG_VARIABLE}=1 shows the traceback of an error."
    )


def _version() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    return f"lightning_moe {__version__} ({libraries}, Python {platform.python_version()})"
