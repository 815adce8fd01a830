"""Which files and which run a command line means, before anything heavy is imported."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_moe.checkpoints.integrity import damage
from lightning_moe.config.compose import Layer, compose, merge
from lightning_moe.config.help import RUN_OPTIONS, help_wanted, short_help
from lightning_moe.config.request import DEFAULT_EXPERIMENT, Request, split_config_flags
from lightning_moe.errors import UserError
from lightning_moe.filenames import CONFIG_FILE
from lightning_moe.processes import process_rank
from lightning_moe.runs import folder as rundir

LAST = "last"


def read_request(command: str, args: Sequence[str], options: Mapping[str, str] = RUN_OPTIONS) -> Request:
    """Find the configuration files, the checkpoint and the run it belongs to; ``--help`` is answered here.

    ``--ckpt_path last`` is the checkpoint of ``run_name``, or without a name that of the run under ``output_dir`` that
    wrote one most recently. A run's own ``config.yaml`` then lies below all other configuration, so that continuing
    needs no repeated flags.

    Args:
        command: the command's name.
        args: its arguments.
        options: option → meaning, for ``--help``: those that not every command has.

    Raises:
        UserError: a file, checkpoint or run that is not there.
        SystemExit: code 0 after ``--help``.
    """
    names, flags = split_config_flags(args)
    layers = compose(names, DEFAULT_EXPERIMENT)
    if (extent := help_wanted(flags)) is not None:
        if extent == "all":
            return Request(layers, ["--help"])
        print(short_help(command, layers, options))
        raise SystemExit(0)
    given = _top_level(layers, flags)
    wanted, run_name = given.get("ckpt_path"), given.get("run_name")
    output_dir = Path(given.get("output_dir") or "runs")
    inherited = rundir.announced()
    if inherited is not None:
        ckpt_path = inherited.ckpt_path
    elif wanted == LAST:
        folder = rundir.newest_run(output_dir) if run_name is None else output_dir / rundir.check_name(run_name)
        ckpt_path = None if folder is None else rundir.last_checkpoint(folder)
    else:
        ckpt_path = None if wanted is None else Path(wanted)
    if ckpt_path is None:
        return Request(layers, flags, None, _nothing_to_continue(command, wanted, run_name, output_dir))
    if not ckpt_path.exists():
        raise UserError(f"ckpt_path={wanted!r}: no such file")
    if inherited is None and wanted != LAST and (problem := damage(ckpt_path)):
        raise UserError(f"ckpt_path={wanted!r}: not a complete checkpoint: it is {problem}")
    folder = rundir.run_of_checkpoint(ckpt_path)
    if folder is None:
        return Request(layers, flags, ckpt_path)
    same_run = run_name is None or folder.resolve() == (output_dir / run_name).resolve()
    layers = compose([str(folder / CONFIG_FILE), *names], DEFAULT_EXPERIMENT)
    return Request(layers, flags, ckpt_path, folder if same_run else None)


def _nothing_to_continue(command: str, wanted: str | None, run_name: str | None, output_dir: Path) -> Path | None:
    """For ``--ckpt_path last`` without a checkpoint: ``fit`` starts afresh (a job's script can always pass it)."""
    if wanted != LAST:
        return None
    where = output_dir if run_name is None else output_dir / run_name
    if command != "fit":
        raise UserError(f"ckpt_path={LAST!r}: no checkpoint under {where}")
    if process_rank() == 0:
        print(f"ckpt_path={LAST!r}: no checkpoint under {where} yet; starting from scratch", file=sys.stderr)
    return None if run_name is None else where


def _top_level(layers: Sequence[Layer], flags: Sequence[str]) -> dict[str, Any]:
    """``run_name``, ``output_dir`` and ``ckpt_path`` as files and flags give them, interpolation resolved."""
    keys = ("run_name", "output_dir", "ckpt_path")
    values: dict[str, Any] = {}
    try:
        tree: Any = OmegaConf.create(merge(layers))
        for pair in _dotlist(flags):
            with suppress(OmegaConfBaseException, yaml.YAMLError):  # the parser has the better message for these
                tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([pair]))
        for key in keys:
            value = OmegaConf.select(tree, key)
            values[key] = None if value in (None, "null", "None", "") else str(value)
    except OmegaConfBaseException as error:
        raise UserError(f"{', '.join(keys)}: {' '.join(str(error).split())}") from error
    return values


def _dotlist(flags: Sequence[str]) -> list[str]:
    """``key=value`` of every ``--key=value`` and ``--key value``."""
    following = [*flags[1:], "--"]
    return [
        flag[2:] if "=" in flag else f"{flag[2:]}={value}"
        for flag, value in zip(flags, following, strict=False)
        if flag.startswith("--") and ("=" in flag or not value.startswith("--"))
    ]
