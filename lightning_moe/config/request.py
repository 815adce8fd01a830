"""The request of a command line: configuration files, flags, the run, and the checkpoint to start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_moe.config.compose import Layer
from lightning_moe.errors import UserError

DEFAULT_EXPERIMENT = "experiment/quickstart"


@dataclass(frozen=True)
class Request:
    """The request of a command line, as far as it is known before the parser exists.

    Args:
        layers: configuration files, lowest first; above them, as one more layer, names and paths as they were typed.
        flags: all other arguments.
        run_name: name of the run's folder; `None` if it is to be generated.
        output_dir: folder of the runs' folders.
        ckpt_path: checkpoint to load, found and verified; `None` for none.
        folder: folder of the run to continue (`fit`), or of the one that wrote the checkpoint (other commands); `None`
            for a new run.
    """

    layers: list[Layer]
    flags: list[str]
    run_name: str | None = None
    output_dir: Path = Path("runs")
    ckpt_path: Path | None = None
    folder: Path | None = None


def split_config_flags(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into the values of ``--config``, in order, and all others."""
    taken, others = _take(args, ("--config", "-c"), "the name of a configuration file")
    return [value for _, value in taken], others


def split_text_flags(args: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """Split arguments into the last value of each key, as it was typed, and all others.

    ``null`` and the empty text are `None`: they take back what a file says.
    """
    taken, others = _take(args, [f"--{key}" for key in keys], "a value")
    return {flag[2:]: None if value in ("", "null") else value for flag, value in taken}, others


def _take(args: Sequence[str], flags: Sequence[str], needed: str) -> tuple[list[tuple[str, str]], list[str]]:
    taken, others, rest = [], [], list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.partition("=")
        if name not in flags:
            others.append(arg)
        elif equals or (rest and not rest[0].startswith("--")):
            taken.append((name, value if equals else rest.pop(0)))
        else:
            raise UserError(f"{arg}: needs {needed}")
    return taken, others
