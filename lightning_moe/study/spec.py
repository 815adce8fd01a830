"""A study's file: the methods, how they are tuned, and with which seeds they are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_moe.config.compose import Layer
from lightning_moe.errors import UserError, did_you_mean
from lightning_moe.sweep.space import check_keys, piece_layers
from lightning_moe.sweep.spec import base_layers, load_file, name_and_folder, read_seeds
from lightning_moe.trust import check_name

TOP_KEYS = ("name", "config", "tune", "seeds", "baseline", "methods", "reference", "output_dir")
TUNE_KEYS = ("key", "values", "seed")
REFERENCE_KEYS = ("source", "loss")
TUNED_AS = "as"


@dataclass(frozen=True)
class Tuning:
    """The tuning of each method: one run per value, and the lowest validation loss wins.

    Args:
        key: dotted configuration key, such as ``model.optimizer.muon_lr``.
        values: values in rising order, whole numbers as such; all methods get the same.
        seed: seed of these runs, and none of the study's, so that no run both chooses and judges a method.
    """

    key: str
    values: tuple[float, ...]
    seed: int


def spelled(value: float) -> str:
    """Return a tuned value for names and tables, as short as is unambiguous."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


@dataclass(frozen=True)
class Method:
    """One row of the study.

    Args:
        name: name in tables, runs and MLflow's tags.
        layers: configuration above the study's own, lowest first.
        tuned_as: method whose tuned value it takes: itself, or the one that it is a variant of.
    """

    name: str
    layers: tuple[Layer, ...] = field(repr=False)
    tuned_as: str

    @property
    def is_tuned(self) -> bool:
        return self.tuned_as == self.name


@dataclass(frozen=True)
class Reference:
    """Published numbers that the page puts beside the study's.

    Args:
        source: source of the numbers.
        loss: method → validation loss in nats per token.
    """

    source: str
    loss: Mapping[str, float]


@dataclass(frozen=True)
class Study:
    """The content of a study's file.

    Args:
        path: path of the file.
        configs: further configuration above the file's own, by the names given.
        name: name of the study, its folder and its MLflow experiment.
        base: configuration below that of the methods, lowest first.
        tuning: tuning of the methods.
        methods: name → method.
        seeds: seeds of the compared runs.
        baseline: name of the method that all others are compared with.
        reference: published numbers; `None` for none.
        folder: folder ``<output_dir>/<name>``.
    """

    path: Path
    configs: tuple[str, ...]
    name: str
    base: tuple[Layer, ...] = field(repr=False)
    tuning: Tuning
    methods: Mapping[str, Method]
    seeds: tuple[int, ...]
    baseline: str
    reference: Reference | None
    folder: Path


def read_study(path: Path, configs: Sequence[str] = (), name: str | None = None) -> Study:
    """Read a study's file.

    Args:
        path: path of the file.
        configs: further configuration above the file's ``config``, as for ``fit --config``.
        name: name instead of the file's.

    Raises:
        UserError: a key or value is wrong; the message names the key.
    """
    needed = ("config", "tune", "seeds", "baseline", "methods")
    content = load_file(path, TOP_KEYS, needed, "docs/study.md", keyed_by_text=("methods", "reference.loss"))
    name, folder = name_and_folder(content, path, name)
    tuning = _tuning(content["tune"], path)
    seeds = read_seeds(content["seeds"], path)
    if tuning.seed in seeds:
        raise UserError(f"{path}: tune.seed={tuning.seed}: is also in seeds; tune with a seed that is not compared")
    methods = _methods(content["methods"], path)
    baseline = str(content["baseline"])
    if baseline not in methods:
        raise UserError(f"{path}: baseline={baseline!r}: is no method: {did_you_mean(baseline, methods, 'known:')}")
    base = base_layers(content["config"], path, configs)
    reference = _reference(content, methods, path)
    return Study(path, tuple(configs), name, base, tuning, methods, seeds, baseline, reference, folder)


def _tuning(content: Any, path: Path) -> Tuning:
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: tune={content!r}: must be {{key: …, values: […], seed: …}}")
    check_keys(content, TUNE_KEYS, f"{path}: tune")
    for key in TUNE_KEYS:
        if key not in content:
            raise UserError(f"{path}: tune.{key}: missing")
    values = content["values"]
    numbers = isinstance(values, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers or not values or sorted(set(values)) != values:
        raise UserError(f"{path}: tune.values={values!r}: must be a list of numbers in rising order")
    (seed,) = read_seeds([content["seed"]], path)
    return Tuning(str(content["key"]), tuple(values), seed)


def _reference(content: Mapping[str, Any], methods: Mapping[str, Method], path: Path) -> Reference | None:
    reference = content.get("reference")
    if reference is None:
        return None
    if not isinstance(reference, Mapping) or set(reference) != set(REFERENCE_KEYS):
        raise UserError(f"{path}: reference={reference!r}: must be {{source: …, loss: {{method: …}}}}")
    losses = reference["loss"]
    if not isinstance(losses, Mapping) or not all(isinstance(loss, int | float) for loss in losses.values()):
        raise UserError(f"{path}: reference.loss={losses!r}: must be {{method: loss}}")
    for name in losses:
        if name not in methods:
            hint = did_you_mean(name, methods, "known:")
            raise UserError(f"{path}: reference.loss: {name!r}: is no method: {hint}")
    return Reference(str(reference["source"]), {str(name): float(loss) for name, loss in losses.items()})


def _methods(content: Any, path: Path) -> dict[str, Method]:
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: methods: must be a mapping of names to settings")
    methods: dict[str, Method] = {}
    for key, settings in content.items():
        name = check_name(str(key), f"{path}: methods")
        if not isinstance(settings, Mapping):
            raise UserError(f"{path}: methods: {name}={settings!r}: must be a mapping of keys to values")
        tuned_as = str(settings.get(TUNED_AS, name))
        below: Sequence[Layer] = ()
        if tuned_as != name:
            tuned = [method.name for method in methods.values() if method.is_tuned]
            if tuned_as not in tuned:
                raise UserError(
                    f"{path}: methods: {name}.{TUNED_AS}={tuned_as!r}: must be an earlier method that is tuned "
                    f"itself: {did_you_mean(tuned_as, tuned, 'these are:')}"
                )
            below = methods[tuned_as].layers
        own = {str(k): value for k, value in settings.items() if k != TUNED_AS}
        methods[name] = Method(name, (*below, *piece_layers(own, path)), tuned_as)
    return methods
