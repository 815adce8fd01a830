"""Which files, which run and which checkpoint a command line means, before anything heavy is imported."""

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
from lightning_moe.config.compose import FLAG, NAMES, Layer, compose, merge, source_of
from lightning_moe.config.help import RUN_OPTIONS, help_wanted, short_help
from lightning_moe.config.request import DEFAULT_EXPERIMENT, Request, split_config_flags, split_text_flags
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
    files, flags = split_config_flags(args)
    layers = compose(files, DEFAULT_EXPERIMENT)
    if (extent := help_wanted(flags)) is not None:
        if extent == "all":
            return Request(layers, ["--help"])
        print(short_help(command, layers, options))
        raise SystemExit(0)
    typed, flags = split_text_flags(flags, NAMES)
    names = _names(layers, flags, typed)
    run_name, wanted = names["run_name"], names["ckpt_path"]
    output_dir = Path(names["output_dir"] or "runs")
    if run_name is not None:
        rundir.check_name(run_name)
    ckpt_path, folder = _find_checkpoint(wanted, run_name, output_dir), None
    if ckpt_path is not None:
        owner = rundir.run_of_checkpoint(ckpt_path)
        if owner is not None:
            layers = compose([str(owner / CONFIG_FILE), *files], DEFAULT_EXPERIMENT)
        if command != "fit":
            folder = owner or ckpt_path.parent
        elif owner is not None and (run_name is None or owner.resolve() == (output_dir / run_name).resolve()):
            folder = owner
    elif wanted == LAST:
        folder = _nothing_to_continue(command, run_name, output_dir)
    layers.append(Layer(Path(FLAG), {**names, "output_dir": names["output_dir"] or "runs"}))
    return Request(layers, flags, run_name, output_dir, ckpt_path, folder)


def _find_checkpoint(wanted: str | None, run_name: str | None, output_dir: Path) -> Path | None:
    """Return the checkpoint that is meant, its checksums verified; `None` for none."""
    inherited = rundir.announced()
    if inherited is not None:
        return inherited.ckpt_path
    if wanted is None:
        return None
    if wanted == LAST:
        folder = rundir.newest_run(output_dir) if run_name is None else output_dir / run_name
        return None if folder is None else rundir.last_checkpoint(folder)
    path = Path(wanted)
    if not path.exists():
        raise UserError(f"ckpt_path={wanted!r}: no such file")
    if problem := damage(path):
        raise UserError(f"ckpt_path={wanted!r}: not a complete checkpoint: it is {problem}")
    return path


def _nothing_to_continue(command: str, run_name: str | None, output_dir: Path) -> Path | None:
    """For ``--ckpt_path last`` without a checkpoint: ``fit`` starts afresh (a job's script can always pass it)."""
    where = output_dir if run_name is None else output_dir / run_name
    if command != "fit":
        raise UserError(f"ckpt_path={LAST!r}: no checkpoint under {where}")
    if process_rank() == 0:
        print(f"ckpt_path={LAST!r}: no checkpoint under {where} yet; starting from scratch", file=sys.stderr)
    return None if run_name is None else where


def _names(layers: Sequence[Layer], flags: Sequence[str], typed: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return `NAMES` as files and flags give them, interpolation resolved. Nobody else reads them.

    Args:
        layers: configuration files, lowest first.
        flags: arguments that interpolation may refer to.
        typed: those of `NAMES` that the command line has.
    """
    names: dict[str, str | None] = {}
    try:
        tree: Any = OmegaConf.create(merge(layers))
        for pair in _dotlist(flags):
            with suppress(OmegaConfBaseException, yaml.YAMLError):  # the parser has the better message for these
                tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([pair]))
        tree = OmegaConf.merge(tree, dict(typed))
        for key in NAMES:
            value = OmegaConf.select(tree, key)
            if OmegaConf.is_config(value):
                raise UserError(f"{key}={value!r} ({source_of(key, layers)}): must be text or null")
            names[key] = None if value in (None, "") else str(value)
    except OmegaConfBaseException as error:
        raise UserError(f"{', '.join(NAMES)}: {' '.join(str(error).split())}") from error
    return names


def _dotlist(flags: Sequence[str]) -> list[str]:
    """Return ``key=value`` of every ``--key=value`` and ``--key value``."""
    following = [*flags[1:], "--"]
    return [
        flag[2:] if "=" in flag else f"{flag[2:]}={value}"
        for flag, value in zip(flags, following, strict=False)
        if flag.startswith("--") and ("=" in flag or not value.startswith("--"))
    ]
