"""Groups of runs that differ in their seed only, and whether groups may be compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_moe.compare.runs import FinishedRun
from lightning_moe.config.settings import settings as config_settings
from lightning_moe.errors import UserError, did_you_mean
from lightning_moe.report.tables import shown

#: what a summary says of how a step's windows were divided: the routing pools and their capacity depend on it
LAYOUT = ("world_size", "micro_batch_size")


def _validation(run: FinishedRun) -> Any:
    trainer, data = run.config["trainer"], run.summary["data"]
    scored = trainer.get("limit_val_batches")
    limit = None if scored in (None, 1.0) else [scored, run.config["data"].get("validation_batch_size")]
    return [data["validation_documents"], data["validation_tokens"], data["validation_bytes"], limit]


#: what runs must share → how it is read off a run
REQUIRED: dict[str, Callable[[FinishedRun], Any]] = {
    "fingerprint": lambda run: run.summary["data"]["fingerprint"],
    "tokenizer": lambda run: run.summary["data"]["tokenizer"],
    "validation": _validation,
    "budget": lambda run: run.summary["train_tokens"],
}
EXPLAINED = {
    "fingerprint": "data fingerprint",
    "tokenizer": "tokenizer",
    "validation": "validation set ([documents, tokens, bytes, [limit_val_batches, batch size]])",
    "budget": "budget (training tokens)",
}


@dataclass(frozen=True)
class Group:
    """The runs of one configuration.

    Args:
        label: routing rule, with the keys by which groups of the same rule differ.
        runs: runs by seed.
    """

    label: str
    runs: Mapping[int, FinishedRun]

    def values(self, metric: str) -> dict[int, float]:
        """Return the metric of each seed whose run has it."""
        found = {seed: run.metric(metric) for seed, run in sorted(self.runs.items())}
        return {seed: value for seed, value in found.items() if value is not None}


def check_comparable(runs: Sequence[FinishedRun], allowed: Sequence[str] = ()) -> list[str]:
    """Refuse runs that were not trained and scored alike.

    Args:
        runs: runs to compare.
        allowed: names in ``REQUIRED`` that may differ.

    Returns:
        A line for each allowed difference that was found.

    Raises:
        UserError: the runs differ; names what differs, with each value and a run that has it.
    """
    notes = []
    for name, read in REQUIRED.items():
        examples: dict[str, FinishedRun] = {}
        for run in runs:
            examples.setdefault(json.dumps(read(run)), run)
        if len(examples) == 1:
            continue
        values = "; ".join(f"{value} in {run.source}" for value, run in examples.items())
        if name not in allowed:
            raise UserError(
                f"these runs differ in their {EXPLAINED[name]}: {values}. Their scores do not compare; leave some out, "
                f"or allow it with --allow {name}"
            )
        notes.append(f"the runs differ in their {EXPLAINED[name]}: {values}")
    return notes


def group(runs: Sequence[FinishedRun]) -> tuple[list[Group], list[str]]:
    """Put runs together that differ in their seed only, in the order in which they come.

    Returns:
        The groups, and a line for each run left out because a later one has the same configuration and seed.
    """
    groups: dict[str, dict[int, FinishedRun]] = {}
    notes = []
    for run in runs:
        members = groups.setdefault(json.dumps(settings(run), sort_keys=True), {})
        if run.seed in members:
            notes.append(f"{members[run.seed].source} is left out: {run.source} is the same configuration and seed")
        members[run.seed] = run
    labels = _labels([next(iter(members.values())) for members in groups.values()])
    return [Group(label, members) for label, members in zip(labels, groups.values(), strict=True)], notes


def settings(run: FinishedRun) -> dict[str, Any]:
    """Return the dotted keys and values that define a run, without the neutral ones.

    A value that changed while the run was continued is the text ``a, from step N: b``.
    """
    found = {**config_settings(run.config), **{key: run.summary[key] for key in LAYOUT}}
    history: dict[str, str] = {}
    for segment in run.summary["segments"]:
        for key, (before, now) in segment["changed"].items():
            history[key] = f"{history.get(key, shown(before))}, from step {segment['step']}: {shown(now)}"
    return found | history


def differing_settings(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Return each key outside of ``model.routing`` in which groups differ, with the value of each group."""
    each = [settings(next(iter(one.runs.values()))) for one in groups]
    keys = dict.fromkeys(key for found in each for key in found if not key.startswith("model.routing"))
    values = {key: [found.get(key) for found in each] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def find_group(groups: Sequence[Group], label: str) -> Group:
    """Find the group of a label, or of the beginning of a label if it is unique.

    Raises:
        UserError: there is no such group, or there are several.
    """
    exact = [one for one in groups if one.label == label]
    found = exact or [one for one in groups if one.label.startswith(label)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"--baseline {label!r}: several groups begin so: {'; '.join(one.label for one in found)}")
    labels = [one.label for one in groups]
    raise UserError(f"--baseline {label!r}: no such group: {did_you_mean(label, labels, 'the groups are')}")


def _labels(examples: Sequence[FinishedRun]) -> list[str]:
    """Return the rule of each group, with its keys in which the groups of that rule differ."""
    labels = []
    for run in examples:
        rivals = [settings(other) for other in examples if other.routing == run.routing]
        mine = settings(run)
        keys = [key for key in mine if any(key not in rival or rival[key] != mine[key] for rival in rivals)]
        details = ", ".join(f"{key.rpartition('.')[2]}={shown(mine[key])}" for key in keys)
        labels.append(f"{run.routing} ({details})" if details else run.routing)
    exact = {label: labels.count(label) for label in labels}
    if max(exact.values(), default=0) > 1:  # numbers that differ after the fourth digit
        labels = [label if exact[label] == 1 else f"{label} #{i}" for i, label in enumerate(labels, 1)]
    return labels
