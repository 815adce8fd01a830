"""What the commands' own argument parsers share."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable
from pathlib import Path

from lightning_moe.atomic import check_writable
from lightning_moe.errors import RunStopped, UserError


def at_least(low: int) -> Callable[[str], int]:
    """``type=`` of an argument that is a whole number from ``low`` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value}: must be at least {low}")
        return value

    return number


def command_parser(command: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command; its texts are printed as they are written."""
    return argparse.ArgumentParser(
        prog=f"python -m lightning_moe {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def refuse_unwritable(folder: Path, option: str) -> None:
    """Check, before the work, that its results can be written.

    Args:
        folder: may be missing.
        option: by which it was given, for the message.

    Raises:
        UserError: it is not writable.
    """
    try:
        check_writable(folder)
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be written: {error.strerror}") from None


def stopped(stop: KeyboardInterrupt) -> RunStopped:
    """What a command that can be started again says when it was stopped.

    Args:
        stop: its argument is the signal; none: Ctrl-C.
    """
    number = int(stop.args[0]) if stop.args else signal.SIGINT
    return RunStopped("stopped: the same command goes on from here", 128 + number)
