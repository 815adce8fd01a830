"""The search space: configuration keys with ranges or choices, some of them only under conditions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moe.bounds import INTEGERS, check_text, number_problem, shown
from lightning_moe.config.compose import INCLUDE, Layer, find_config, load_layers
from lightning_moe.errors import UserError, did_you_mean
from lightning_moe.trust import check_name

if TYPE_CHECKING:
    from optuna.trial import Trial

Value = bool | int | float | str | None
MOST_VALUES = 100_000  # of a range that are listed


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included.

    Args:
        whole: whether there are integers only.
        log: whether values are uniform in the logarithm.
        step: distance of the values ``low``, ``low + step``, …; `None` for all numbers.
    """

    low: float
    high: float
    whole: bool
    log: bool = False
    step: float | None = None

    def suggest(self, trial: Trial, key: str) -> Value:
        """Let Optuna choose the trial's value."""
        if self.whole:
            return trial.suggest_int(key, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(key, self.low, self.high, step=self.step, log=self.log)

    @property
    def ends(self) -> tuple[Value, ...]:
        """Return the values at which a range is checked."""
        return (self.low, self.high)

    @property
    def values(self) -> tuple[Value, ...] | None:
        """Return all values; `None` if there are too many to list."""
        if self.step is None and not self.whole:
            return None
        step = self.step or 1
        count = floor((self.high - self.low) / step + 1e-9) + 1
        return None if count > MOST_VALUES else tuple(self.low + i * step for i in range(count))


@dataclass(frozen=True)
class Choice:
    """One of several values of a key or, with ``settings``, one of several pieces of configuration.

    Args:
        values: values of the key, or names of the pieces.
        settings: keys and values of each name, as in a configuration file, with ``include``.
    """

    values: tuple[Value, ...]
    settings: Mapping[str, Mapping[str, Any]] | None = None

    def suggest(self, trial: Trial, key: str) -> Value:
        """Let Optuna choose the trial's value."""
        return trial.suggest_categorical(key, self.values)

    @property
    def ends(self) -> tuple[Value, ...]:
        """Return all values, because a choice is checked at each."""
        return self.values


@dataclass(frozen=True)
class Parameter:
    """One dimension of the space.

    Args:
        key: dotted configuration key, or a free name for pieces of configuration.
        domain: values of the key.
        when: earlier keys of the space, with the values under which this one is sampled.
    """

    key: str
    domain: Range | Choice
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)

    def is_active(self, values: Mapping[str, Value]) -> bool:
        """Return whether the conditions hold."""
        return all(key in values and values[key] in allowed for key, allowed in self.when.items())


@dataclass(frozen=True)
class Space:
    """The search space of a sweep.

    Args:
        parameters: dimensions of the space in the order in which they are sampled.
        path: path of the sweep's file, for messages and for relative names in ``include``.
    """

    parameters: tuple[Parameter, ...]
    path: Path

    def sample(self, trial: Trial) -> dict[str, Value]:
        """Let Optuna choose every parameter whose conditions hold. Values that the trial has already are kept."""
        values: dict[str, Value] = {}
        for parameter in self.parameters:
            if parameter.is_active(values):
                values[parameter.key] = parameter.domain.suggest(trial, parameter.key)
        return values

    def layers(self, values: Mapping[str, Value]) -> list[Layer]:
        """Return the configuration of these values, lowest first: chosen pieces, then single keys."""
        pieces, keys = [], {}
        for parameter in self.parameters:
            if parameter.key not in values:
                continue
            value = values[parameter.key]
            if isinstance(parameter.domain, Choice) and value not in parameter.domain.values:  # of another's storage
                raise UserError(f"{self.path}: space: {parameter.key}={value!r}: the storage has a value of no choice")
            if isinstance(parameter.domain, Choice) and parameter.domain.settings is not None:
                pieces += piece_layers(parameter.domain.settings[str(value)], self.path)
            else:
                keys[parameter.key] = value
        return [*pieces, Layer(self.path, nest(keys))]

    def corners(self) -> Iterator[dict[str, Value]]:
        """Yield points, each once, in which each end of each range and each choice occurs."""
        points = [self._point({})]
        for parameter in self.parameters:
            points += [self._point(self._conditions(parameter) | {parameter.key: end}) for end in parameter.domain.ends]
        yield from {repr(point): point for point in points}.values()

    def size(self) -> int | None:
        """Count the points; return `None` if a range has too many to count."""
        return _count(self.parameters, {})

    def _conditions(self, parameter: Parameter) -> dict[str, Value]:
        fixed: dict[str, Value] = {}
        for key, allowed in parameter.when.items():
            fixed |= self._conditions(next(p for p in self.parameters if p.key == key)) | {key: allowed[0]}
        return fixed

    def _point(self, fixed: Mapping[str, Value]) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for parameter in self.parameters:
            if parameter.is_active(values):
                values[parameter.key] = fixed.get(parameter.key, parameter.domain.ends[0])
        return values


def _count(parameters: Sequence[Parameter], values: Mapping[str, Value]) -> int | None:
    """Count the points of the remaining parameters, given the values of those before."""
    if not any(parameter.when for parameter in parameters):
        sizes = [parameter.domain.values for parameter in parameters]
        return prod(len(size) for size in sizes if size is not None) if all(s is not None for s in sizes) else None
    first, rest = parameters[0], parameters[1:]
    if not first.is_active(values):
        return _count(rest, values)
    if first.domain.values is None:
        return None
    counts = [_count(rest, {**values, first.key: value}) for value in first.domain.values]
    return None if None in counts else sum(count for count in counts if count is not None)


def nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"a": {"b": 1}}`` for ``{"a.b": 1}``.

    Raises:
        UserError: a key lies in another one that has a plain value.
    """
    tree: dict[str, Any] = {}
    for key, value in dotted.items():
        *branches, leaf = key.split(".")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise UserError(f"{key}={value!r}: {branch} has a value of its own, {node!r}; leave one of them out")
        node[leaf] = nest(value) if isinstance(value, Mapping) else value
    return tree


def piece_layers(settings: Mapping[str, Any], path: Path) -> list[Layer]:
    """Return the layers of a piece of configuration with dotted keys; those of its ``include`` come first."""
    names = settings.get(INCLUDE, [])
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{path}: {INCLUDE}: must be a list of file names, found {names!r}")
    try:
        below = [layer for name in names for layer in load_layers(find_config(name, path.parent))]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return [*below, Layer(path, nest({key: value for key, value in settings.items() if key != INCLUDE}))]


def check_keys(content: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    """Refuse a key that is none of ``known``, with the nearest one.

    Raises:
        UserError: the message names ``where`` and the key.
    """
    for key in content:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}: {did_you_mean(key, known, 'known are')}")


def read_space(content: Any, path: Path) -> Space:
    """Read the ``space`` of a sweep's file.

    Raises:
        UserError: a key or value is wrong; the message names the key.
    """
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: space: must be a mapping of configuration keys to ranges or choices")
    parameters: list[Parameter] = []
    for key, entry in content.items():
        where = f"{path}: space: {key}"
        if not isinstance(entry, Mapping):
            raise UserError(f"{where}={entry!r}: must be {{float: [low, high]}}, {{int: […]}} or {{choices: […]}}")
        check_name(str(key), f"{path}: space")  # it becomes that of a folder
        parameters.append(Parameter(str(key), _domain(entry, where), _conditions(entry, parameters, where)))
    return Space(tuple(parameters), path)


def _domain(entry: Mapping[str, Any], where: str) -> Range | Choice:
    kinds = [kind for kind in ("float", "int", "choices") if kind in entry]
    check_keys(entry, ("float", "int", "choices", "log", "step", "when"), where)
    if len(kinds) != 1:
        raise UserError(f"{where}: needs one of float, int and choices, found {', '.join(kinds) or 'none'}")
    if kinds == ["choices"]:
        for name in {"log", "step"} & entry.keys():
            raise UserError(f"{where}: {name} belongs to a range, not to choices")
        return _choice(entry["choices"], where)
    return _range(kinds[0], entry, where)


def _range(kind: str, entry: Mapping[str, Any], where: str) -> Range:
    ends, log, step = entry[kind], entry.get("log", False), entry.get("step")
    number = int if kind == "int" else (int, float)
    numbers = isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, number) for end in ends)
    if not numbers or any(isinstance(end, bool) for end in ends):
        what = "whole numbers" if kind == "int" else "numbers"
        raise UserError(f"{where}: {kind}={ends!r}: must be two {what}, [low, high]")
    low, high = ends
    for end in (low, high, *([] if step is None or not isinstance(step, int | float) else [step])):
        if problem := number_problem(end, *(INTEGERS if kind == "int" else (-1e30, 1e30))):
            raise UserError(f"{where}: {kind}={ends!r}, step={step!r}: each {problem}")
    if low >= high:
        raise UserError(f"{where}: {kind}={ends!r}: the first number must be below the second")
    if not isinstance(log, bool):
        raise UserError(f"{where}: log={log!r}: must be true or false")
    if log and low <= 0:
        raise UserError(f"{where}: {kind}={ends!r}: with log: true both must be above 0")
    if step is not None and (log or not isinstance(step, number) or isinstance(step, bool) or step <= 0):
        raise UserError(f"{where}: step={step!r}: must be a number above 0 like the ends, and not together with log")
    return Range(low if kind == "int" else float(low), high if kind == "int" else float(high), kind == "int", log, step)


def _choice(choices: Any, where: str) -> Choice:
    if isinstance(choices, Mapping):
        for name, settings in choices.items():
            if not isinstance(name, str):
                raise UserError(f"{where}: choices: {name!r}: a name must be text (quote it)")
            check_name(name, f"{where}: choices")  # it becomes that of a file
            if not isinstance(settings, Mapping):
                raise UserError(f"{where}: choices: {name}={settings!r}: must be a mapping of keys to values")
        if len(choices) > 1:
            return Choice(tuple(choices), dict(choices))
    elif isinstance(choices, list) and len(choices) > 1:
        for value in choices:
            if not isinstance(value, bool | int | float | str | None):
                raise UserError(f"{where}: choices: {value!r}: give pieces of configuration a name: {{name: {{…}}}}")
            if isinstance(value, float | int) and (problem := number_problem(value, -1e30, 1e30)):
                raise UserError(f"{where}: choices: {shown(value)}: {problem}")
            if isinstance(value, str):
                check_text(value, f"{where}: choices")
        if len({(type(value), value) for value in choices}) == len(choices):
            return Choice(tuple(choices))
    raise UserError(f"{where}: choices={choices!r}: must be two or more different values, or names with settings")


def _conditions(entry: Mapping[str, Any], earlier: Sequence[Parameter], where: str) -> dict[str, tuple[Value, ...]]:
    when = entry.get("when", {})
    if not isinstance(when, Mapping):
        raise UserError(f"{where}: when={when!r}: must be {{an earlier key of the space: [values]}}")
    domains = {parameter.key: parameter.domain for parameter in earlier}
    conditions = {}
    for key, allowed in when.items():
        domain, values = domains.get(key), allowed if isinstance(allowed, list) else [allowed]
        if not isinstance(domain, Choice):
            choices = [name for name, domain in domains.items() if isinstance(domain, Choice)]
            hint = did_you_mean(key, choices, "these are:")
            raise UserError(f"{where}: when: {key!r} is no earlier key of the space with choices: {hint}")
        for value in values:
            if value not in domain.values:
                known = ", ".join(map(str, domain.values))
                raise UserError(f"{where}: when: {key}={value!r}: is none of its choices ({known})")
        conditions[key] = tuple(values)
    return conditions
