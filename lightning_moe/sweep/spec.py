"""A sweep's file: its space, objectives, budget and storage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_moe.bounds import SEEDS, check_text
from lightning_moe.config.compose import INCLUDE, Layer, compose, find_config, load_layers, merge
from lightning_moe.config.request import DEFAULT_EXPERIMENT
from lightning_moe.config.yaml_text import load_yaml
from lightning_moe.errors import UserError
from lightning_moe.redaction import redact_all
from lightning_moe.sweep.space import Space, check_keys, piece_layers, read_space
from lightning_moe.trust import check_name
from lightning_moe.user_paths import user_path

DIRECTIONS = ("minimize", "maximize")
TOP_KEYS = ("name", "config", "space", "objectives", "sampler", "pruner", "budget", "seeds", "storage", "output_dir")
NAMES = ("name", "output_dir", "baseline", "methods.*.as")  # text as it was typed
BUDGET_KEYS = ("trials", "hours", "tokens_per_trial")


@dataclass(frozen=True)
class Sweep:
    """The content of a sweep's file.

    Args:
        path: path of the file.
        name: name of the Optuna study, of the MLflow run, and of the folder under ``output_dir``.
        base: configuration below that of the trials, lowest first.
        space: search space.
        objectives: metric → ``minimize`` or ``maximize``.
        sampler: ``name`` of an Optuna sampler, and its arguments.
        pruner: ``name`` of an Optuna pruner, and its arguments; `None` lets every trial run to its end.
        trials: number of trials, over all processes and starts.
        hours: time after the start of the command in which trials begin; `None` for no limit.
        tokens_per_trial: training tokens of each run; `None` for those of the configuration.
        seeds: seeds of a trial's runs, whose mean is the trial's value.
        storage: URL of the Optuna study; `None` for a database in the sweep's folder.
        folder: folder ``<output_dir>/<name>``.
    """

    path: Path
    name: str
    base: tuple[Layer, ...]
    space: Space
    objectives: Mapping[str, str]
    sampler: Mapping[str, Any]
    pruner: Mapping[str, Any] | None
    trials: int
    hours: float | None
    tokens_per_trial: int | None
    seeds: tuple[int, ...]
    storage: str | None
    folder: Path

    def identity(self) -> dict[str, Any]:
        """Return what must not change while the sweep continues, as plain data that JSON does not change."""
        space = {}
        for parameter in self.space.parameters:
            domain = {name: value for name, value in vars(parameter.domain).items() if value is not None}
            space[parameter.key] = domain | ({"when": parameter.when} if parameter.when else {})
        identity = {
            "config": merge(self.base),
            "space": space,
            "objectives": self.objectives,
            "seeds": self.seeds,
            "budget": {"tokens_per_trial": self.tokens_per_trial},
        }
        return dict(json.loads(json.dumps(redact_all(identity))))


def read_sweep(path: Path, configs: Sequence[str] = (), name: str | None = None) -> Sweep:
    """Read a sweep's file.

    Args:
        path: path of the file.
        configs: further configuration above the file's ``config``, as for ``fit --config``.
        name: name instead of the file's.

    Raises:
        UserError: a key or value is wrong; the message names the key.
    """
    content = load_file(path, TOP_KEYS, ("config", "space", "objectives", "budget"), "docs/sweeps.md")
    budget = content["budget"]
    if not isinstance(budget, Mapping):
        raise UserError(f"{path}: budget={budget!r}: must be a mapping with trials")
    check_keys(budget, BUDGET_KEYS, f"{path}: budget")
    name, folder = name_and_folder(content, path, name)
    objectives = _objectives(content["objectives"], path)
    pruner = _named(content.get("pruner"), "pruner", path)
    if pruner is not None and len(objectives) > 1:
        raise UserError(f"{path}: pruner: {pruner['name']}: Optuna prunes with one objective only, here are several")
    tokens = _number(budget, "tokens_per_trial", int, path)
    base = base_layers(content["config"], path, configs)
    space = read_space(content["space"], path)
    if tokens is not None and any(parameter.key == "trainer.max_steps" for parameter in space.parameters):
        raise UserError(f"{path}: space: trainer.max_steps: follows from budget.tokens_per_trial; take one of them out")
    trials = _number(budget, "trials", int, path)
    if trials is None:
        raise UserError(f"{path}: budget.trials: missing: the number of trials of the whole sweep")
    storage = content.get("storage")
    if isinstance(storage, str):
        check_text(storage, f"{path}: storage")
    elif storage is not None:
        raise UserError(f"{path}: storage={storage!r}: must be a URL, or null for a database in the sweep's folder")
    return Sweep(
        path,
        name,
        base,
        space,
        objectives,
        _named(content.get("sampler") or {"name": "TPESampler", "seed": 1}, "sampler", path) or {},
        pruner,
        trials,
        _number(budget, "hours", float, path),
        tokens,
        read_seeds(content.get("seeds", [1]), path),
        storage,
        folder,
    )


def load_file(
    path: Path, known: Sequence[str], needed: Sequence[str], docs: str, keyed_by_text: Sequence[str] = ()
) -> dict[str, Any]:
    """Load a sweep's or study's file, with ``storage`` resolved.

    Args:
        path: path of the file.
        known: all keys.
        needed: keys that the file must have.
        docs: page that explains them.
        keyed_by_text: dotted keys of mappings whose own keys are names, as typed.

    Raises:
        UserError: there is no such file, it is not a mapping, or it has an unknown key or lacks one.
    """
    if not path.is_file():
        raise UserError(f"{str(path)!r}: no such file")
    try:
        loaded = load_yaml(path, NAMES, keyed_by_text)
        if "storage" in loaded:
            loaded.storage = loaded.storage  # ${oc.env:…} here; in the configuration it is resolved later
        content = OmegaConf.to_container(loaded, resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping of keys to values, found a {type(content).__name__}")
    check_keys(content, known, str(path))
    for key in needed:
        if key not in content:
            raise UserError(f"{path}: {key}: missing (see {docs})")
    return {str(key): value for key, value in content.items()}


def name_and_folder(content: Mapping[str, Any], path: Path, name: str | None) -> tuple[str, Path]:
    """Return the name of a sweep or study (``name``, or that in the file, or the file's own), and its folder.

    Raises:
        UserError: no folder can have that name.
    """
    given = None if name == "null" else name  # as for `fit --run_name null`
    name = check_name(str(given or content.get("name") or path.stem), "--name" if given else f"{path}: name")
    return name, user_path(str(content.get("output_dir") or "runs"), f"{path}: output_dir") / name


def base_layers(entries: Any, path: Path, configs: Sequence[str]) -> tuple[Layer, ...]:
    """Return the layers below the configuration of the runs, lowest first: the default, ``config``, ``configs``.

    Raises:
        UserError: a layer is wrong; the message names the file or key.
    """
    extra = [layer for config in configs for layer in load_layers(find_config(config))]
    return (*compose([], DEFAULT_EXPERIMENT), *_config_layers(entries, path), *extra)


def _config_layers(entries: Any, path: Path) -> list[Layer]:
    """Return the layers of ``config``, a list of files and of mappings of keys to values."""
    if not (isinstance(entries, list) and all(isinstance(entry, str | dict) for entry in entries)):
        raise UserError(f"{path}: config={entries!r}: must be a list of files (as for fit --config) and {{key: value}}")
    pieces = [{INCLUDE: [entry]} if isinstance(entry, str) else entry for entry in entries]
    return [layer for piece in pieces for layer in piece_layers(piece, path)]


def _objectives(objectives: Any, path: Path) -> dict[str, str]:
    if not isinstance(objectives, Mapping) or not objectives:
        raise UserError(f"{path}: objectives={objectives!r}: must be {{metric: minimize or maximize}}")
    for metric, direction in objectives.items():
        check_text(str(metric), f"{path}: objectives")
        if direction not in DIRECTIONS:
            raise UserError(f"{path}: objectives: {metric}={direction!r}: must be minimize or maximize")
    return {str(metric): str(direction) for metric, direction in objectives.items()}


def _named(entry: Any, key: str, path: Path) -> dict[str, Any] | None:
    if entry is None:
        return None
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise UserError(f"{path}: {key}={entry!r}: must be {{name: …, argument: value, …}}")
    return {str(name): value for name, value in entry.items()}


def _number(budget: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    value = budget.get(key)
    kinds = (int,) if kind is int else (int, float)
    right = isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < 10**15
    if value is not None and not right:
        raise UserError(f"{path}: budget.{key}={value!r}: must be a {'whole ' if kind is int else ''}number above 0")
    return value


def read_seeds(seeds: Any, path: Path) -> tuple[int, ...]:
    """Check the list ``seeds``.

    Raises:
        UserError: it is not a list of different whole numbers.
    """
    whole = isinstance(seeds, list) and all(isinstance(seed, int) and 0 <= seed <= SEEDS[1] for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds={seeds!r}: must be a list of different whole numbers from 0 to {SEEDS[1]}")
    return tuple(seeds)
