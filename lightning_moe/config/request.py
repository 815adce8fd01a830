"""What the command line asks for: configuration files, flags, and the checkpoint to start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_moe.config.compose import Layer
from lightning_moe.errors import UserError

DEFAULT_EXPERIMENT = "experiment/quickstart"


@dataclass(frozen=True)
class Request:
    """What the command line asks for, as far as it can be told before the parser exists.

    Args:
        layers: configuration files, lowest first.
        flags: the other arguments.
        ckpt_path: checkpoint to load; null for none.
        continues: folder of the run to continue; null for a new run.
    """

    layers: list[Layer]
    flags: list[str]
    ckpt_path: Path | None = None
    continues: Path | None = None


def split_config_flags(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """``--config`` values in order, and all other arguments."""
    names, others, rest = [], [], list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.partition("=")
        if name not in ("--config", "-c"):
            others.append(arg)
        elif equals or rest:
            names.append(value if equals else rest.pop(0))
        else:
            raise UserError(f"{arg}: needs the name of a configuration file")
    return names, others
