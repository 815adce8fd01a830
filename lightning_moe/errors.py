"""Errors that end a command early; docs/running.md lists the exit codes."""

from collections.abc import Iterable
from difflib import get_close_matches

from lightning_moe.redaction import redact


class UserError(ValueError):
    """Input that the user can correct: a key, a file, a layout.

    The message is complete: it names the key or file, the value found, and what would be right. The command line
    prints it without a traceback and exits with code 2. Passwords of URLs are taken out of it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


def did_you_mean(name: object, known: Iterable[str], otherwise: str) -> str:
    """Suggest the known name that is nearest to a misspelt one, for the end of an error's message.

    Args:
        name: misspelt name.
        known: right names.
        otherwise: text if none is near, such as ``known are``; the names follow.
    """
    names = [*known]
    near = get_close_matches(str(name), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise} {', '.join(names) or 'none'}"


class MemoryRanOut(RuntimeError):
    """The memory of a device ran out in training; the message says what would take less. The exit code is 6."""


class RunEnded(RuntimeError):
    """Training ends before its last step, for a reason that all ranks have agreed on.

    Attributes:
        exit_code: exit code of the command.
    """

    exit_code: int


class TrainingDiverged(RunEnded):
    """The loss is no longer a number; the message says at which step, and where it began."""

    exit_code = 3


class CheckpointNotWritten(RunEnded):
    """The disk did not take a checkpoint; the message says what is missing and which checkpoint is left."""

    exit_code = 4


class RunStopped(RunEnded):
    """A signal asked the run to stop, and its checkpoint is written.

    Args:
        message: text that says where the checkpoint is and how to continue.
        exit_code: 143 (SIGTERM, SIGUSR1) or 130 (Ctrl-C).
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
