"""The files, the run and the checkpoint of a command line, before anything heavy is imported."""

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
from lightning_moe.config.compose import FLAG, NAMES, Layer, compose, find_config, merge, read_layer, source_of
from lightning_moe.config.help import RUN_OPTIONS, help_wanted, short_help
from lightning_moe.config.request import DEFAULT_EXPERIMENT, Request, split_config_flags, split_text_flags
from lightning_moe.errors import UserError
from lightning_moe.filenames import CONFIG_FILE
from lightning_moe.processes import process_rank
from lightning_moe.runs import folder as rundir
from lightning_moe.trust import check_name, check_stored_config, refuse_links_out
from lightning_moe.user_paths import user_path

LAST = "last"


def read_request(command: str, args: Sequence[str], options: Mapping[str, str] = RUN_OPTIONS) -> Request:
    """Find the configuration files, the checkpoint and its run; answer ``--help``.

    ``--ckpt_path last`` is the checkpoint of ``run_name`` or, without a name, that of the run under ``output_dir`` that
    wrote one most recently. The run's ``config.yaml`` is then the lowest layer, so that continuing needs no repeated
    flags.

    Args:
        command: name of the command.
        args: arguments of the command.
        options: option → meaning for ``--help``, for options that not every command has.

    Raises:
        UserError: there is no such file, checkpoint or run.
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
    output_dir = user_path(names["output_dir"] or "runs", "output_dir")
    if run_name is not None:
        check_name(run_name, "run_name")
    ckpt_path, folder = _find_checkpoint(wanted, run_name, output_dir), None
    if ckpt_path is not None:
        owner = rundir.run_of_checkpoint(ckpt_path)
        if owner is not None:
            layers = _layers_of_run(owner, files)
        if command != "fit":
            folder = owner or ckpt_path.parent
        elif owner is not None and (run_name is None or owner.resolve() == (output_dir / run_name).resolve()):
            folder = owner
    elif wanted == LAST:
        folder = _nothing_to_continue(command, run_name, output_dir)
        if folder is not None:
            layers = _layers_of_run(folder, files)
    layers.append(Layer(Path(FLAG), {**names, "output_dir": str(output_dir)}))
    return Request(layers, flags, run_name, output_dir, ckpt_path, folder)


def _layers_of_run(folder: Path, files: Sequence[str]) -> list[Layer]:
    """Return the layers of a run's own configuration and of the given files, lowest first.

    Raises:
        UserError: the run's configuration was written elsewhere, and decides what its user alone may (`trust`).
    """
    config = folder / CONFIG_FILE
    if config.resolve() not in [find_config(name).resolve() for name in files]:  # naming the file is consent
        own = read_layer(config)
        check_stored_config(config.read_text(encoding="utf-8"), {**own.data, "include": list(own.includes)}, folder)
        refuse_links_out(folder, f"name the configuration: --config {config}")
    return compose([str(config), *files], DEFAULT_EXPERIMENT)


def _find_checkpoint(wanted: str | None, run_name: str | None, output_dir: Path) -> Path | None:
    """Return the wanted checkpoint after a check of its checksums; `None` for none."""
    inherited = rundir.announced()
    if inherited is not None:
        return inherited.ckpt_path
    if wanted is None:
        return None
    if wanted == LAST:
        folder = rundir.newest_run(output_dir) if run_name is None else output_dir / run_name
        return None if folder is None else rundir.last_checkpoint(folder)
    path = user_path(wanted, "ckpt_path")
    if not path.exists():
        raise UserError(f"ckpt_path={wanted!r}: no such file")
    if problem := damage(path):
        raise UserError(f"ckpt_path={wanted!r}: not a complete checkpoint: it is {problem}")
    return path


def _nothing_to_continue(command: str, run_name: str | None, output_dir: Path) -> Path | None:
    """Let ``fit --ckpt_path last`` start from scratch, so that a job's script can always pass it; refuse others.

    Returns:
        The folder of a run that was killed before its first checkpoint; `None` for a new run.
    """
    where = output_dir if run_name is None else output_dir / run_name
    if command != "fit":
        raise UserError(f"ckpt_path={LAST!r}: no checkpoint under {where}")
    begun = where if run_name is not None and (where / CONFIG_FILE).is_file() else None
    if process_rank() == 0:
        how = "" if begun is None else f" with {where / CONFIG_FILE}"
        print(f"ckpt_path={LAST!r}: no checkpoint under {where} yet; starting from scratch{how}", file=sys.stderr)
    return begun


def _names(layers: Sequence[Layer], flags: Sequence[str], typed: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return `NAMES` from files and flags, with interpolation resolved. No other code reads them.

    Args:
        layers: configuration files, lowest first.
        flags: arguments that interpolation may refer to.
        typed: values of `NAMES` on the command line.
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
