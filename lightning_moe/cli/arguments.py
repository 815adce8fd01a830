"""Options and checks that several commands share, so that one flag has one meaning."""

from __future__ import annotations

import argparse
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_moe import file_schema
from lightning_moe.atomic import check_writable
from lightning_moe.bounds import SEEDS
from lightning_moe.errors import RunStopped, UserError
from lightning_moe.user_paths import user_path

LARGEST_TEXT = 2**36  # bytes: more than any memory holds
MOST = 10**15  # tokens, steps or bytes


def at_least(low: int) -> Callable[[str], int]:
    """Return the ``type=`` of an argument that is a whole number from ``low`` on."""
    return whole_number(low, MOST)


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return the ``type=`` of an argument that is a whole number from ``low`` to ``high``."""

    def number(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            right = f"at least {low}" if value < low else f"at most {high:,}"
            raise argparse.ArgumentTypeError(f"{text}: must be {right}")
        return value

    return number


def real_number(low: float, high: float = math.inf, open_low: bool = False) -> Callable[[str], float]:
    """Return the ``type=`` of an argument that is a finite number from ``low`` to ``high``.

    Args:
        low: lowest number.
        high: highest number.
        open_low: whether ``low`` itself is not allowed.
    """

    def number(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and low <= value <= high) or (open_low and value == low):
            least = f"above {low:g}" if open_low else f"{low:g} or more"
            most = "" if math.isinf(high) else f", and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text}: must be {least}{most}")
        return value

    return number


def home_path(text: str) -> Path:
    """Return the path of an argument, in which ``~`` is the home folder; a ``type=`` of arguments."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; must be a path")
    try:
        return user_path(text, "path")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def home_text(text: str) -> str:
    """Return the same as text, for an argument that may be ``NAME=PATH`` too."""
    return str(home_path(text)) if text.startswith("~") or not text else text


#: flag → arguments of ``add_argument``
SHARED: dict[str, dict[str, Any]] = {
    "--ckpt_path": {
        "type": home_text,
        "metavar": "PATH",
        "help": "checkpoint to read: a file, a sharded folder, or an export",
    },
    "--model": {
        "type": home_text,
        "metavar": "DIR_OR_NAME",
        "help": "released model of the transformers library, or thresholds for one from `calibrate --model`",
    },
    "--dtype": {
        "choices": ("auto", "float32", "bfloat16", "float16"),
        "default": "auto",
        "help": "with --model, dtype of its weights; auto is that of its files",
    },
    "--trust_remote_code": {"action": "store_true", "help": "with --model, run code that comes with it"},
    "--output": {"type": home_path, "metavar": "PATH", "help": "checkpoint or export to write"},
    "--output_dir": {"type": home_path, "metavar": "DIR", "help": "folder to write"},
    "--overwrite": {"action": "store_true", "help": "replace what an earlier call wrote there"},
    "--text": {"type": home_text, "metavar": "FILE", "help": "file with your own text, UTF-8"},
    "--tokenizer": {
        "type": home_text,
        "metavar": "FILE",
        "help": "tokenizer.json (default: that of the export, or of the run)",
    },
    "--max_tokens": {"type": at_least(0), "metavar": "N", "help": "number of tokens to read at most, 0 for all"},
    "--sequence_length": {"type": at_least(2), "metavar": "S", "help": "tokens per sequence"},
    "--batch_size": {"type": at_least(1), "metavar": "B", "help": "sequences in a batch"},
    "--seed": {"type": whole_number(*SEEDS), "default": 1, "help": "random seed"},
    "--device": {"default": "cpu", "help": "torch device that the model runs on"},
    "--precision": {
        "choices": ("32-true", "bf16-mixed", "bf16-true"),
        "help": "precision that the model computes in, in the trainer's words",
    },
    "--workers": {"type": at_least(1), "default": 1, "metavar": "N", "help": "runs at the same time"},
    "--config": {"action": "append", "default": [], "metavar": "FILE", "help": "configuration above that of the file"},
    "--name": {"metavar": "NAME", "help": "name, instead of the file's"},
    "--experiment_name": {"metavar": "NAME", "help": "MLflow experiment"},
    "--tracking_uri": {"metavar": "URI", "help": "MLflow's store"},
    "--no_mlflow": {"action": "store_true", "help": "do not log the results to MLflow"},
}


def add_shared(parser: argparse.ArgumentParser, flag: str, note: str = "", **more: Any) -> None:
    """Add an option that several commands have.

    Args:
        parser: parser of the command.
        flag: key of `SHARED`.
        note: text of this command, to put after the shared help text.
        **more: further arguments of ``add_argument``, such as ``default`` or ``required``.
    """
    options = {**SHARED[flag], **more}
    default = f" (default: {options['default']})" if options.get("default") else ""
    parser.add_argument(flag, **{**options, "help": f"{options['help']}{note}{default}"})


def add_checkpoint_or_model(parser: argparse.ArgumentParser, note: str = "", **more: Any) -> None:
    """Add ``--ckpt_path`` and ``--model``, of which one must be given, and the options of the latter.

    Args:
        parser: parser of the command.
        note: text to put after the shared help texts of both.
        **more: further arguments of ``add_argument`` of both.
    """
    group = parser.add_mutually_exclusive_group(required=True)
    for flag in ("--ckpt_path", "--model"):
        options = {**SHARED[flag], **({"type": home_path} if flag == "--ckpt_path" and not more else {}), **more}
        group.add_argument(flag, **{**options, "help": f"{options['help']}{note}"})
    for flag in ("--dtype", "--trust_remote_code"):
        add_shared(parser, flag)


def command_parser(command: str, description: str, **more: Any) -> argparse.ArgumentParser:
    """Build the parser of a command, which keeps line breaks in its texts and takes whole flags only.

    Args:
        command: name of the command.
        description: text to put above the list of options.
        **more: further arguments of ``ArgumentParser``, such as ``epilog``.
    """
    return argparse.ArgumentParser(
        prog=f"python -m lightning_moe {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **more,
    )


def named_path(flag: str, argument: str) -> tuple[str | None, str]:
    """Split ``[NAME=]PATH`` into the name, or `None`, and the path.

    Raises:
        UserError: the name or the path is empty.
    """
    name, equals, path = argument.partition("=")
    if not equals or "/" in name or Path(argument).exists():
        name, path = "", argument
    elif not name:
        path = ""
    if not path:
        raise UserError(f"{flag} {argument}: must be PATH or NAME=PATH.")
    return name or None, str(user_path(path, flag)) if path.startswith("~") else path


def read_text(flag: str, path: str) -> str:
    """Read a UTF-8 file.

    Args:
        flag: option that names the file, for the message.
        path: path of the file.

    Raises:
        UserError: the file cannot be read, is no regular file, or is not UTF-8.
    """
    try:
        return file_schema.read_text(Path(path), f"{flag} {path}", largest=LARGEST_TEXT)
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file") from None


def refuse_unwritable(output_dir: Path, flag: str = "--output_dir") -> None:
    """Check before the work that its results can be written.

    Args:
        output_dir: value of the flag; the folder may be missing.
        flag: flag of the folder, for the message.

    Raises:
        UserError: the folder is not writable.
    """
    try:
        check_writable(output_dir)
    except OSError as error:
        raise UserError(f"{flag} {output_dir}: cannot be written: {error.strerror}") from None


def refuse_existing(output_dir: Path) -> None:
    """Check before the work that its results go to a new folder, which can be written.

    Args:
        output_dir: value of ``--output_dir``.

    Raises:
        UserError: the folder exists, or is not writable.
    """
    if output_dir.exists():
        raise UserError(f"--output_dir {output_dir}: exists, and nothing is overwritten; give another folder.")
    refuse_unwritable(output_dir)


def stopped(stop: KeyboardInterrupt) -> RunStopped:
    """Return the error of a stopped command that can be started again.

    Args:
        stop: interrupt, with the signal as argument; without one it was Ctrl-C.
    """
    number = int(stop.args[0]) if stop.args else signal.SIGINT
    return RunStopped("stopped: the same command continues from here", 128 + number)
