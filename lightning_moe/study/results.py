"""The results of a study, from its finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_moe.compare import report
from lightning_moe.compare.groups import Group, check_comparable
from lightning_moe.compare.report import GroupResult
from lightning_moe.compare.runs import read_folders
from lightning_moe.compare.statistics import Estimate, estimate
from lightning_moe.errors import UserError
from lightning_moe.filenames import JOURNAL_FILE, METRICS_FILE
from lightning_moe.study.runs import (
    StudyRun,
    compared_runs,
    configuration,
    tuned_values,
    tuning_losses,
    tuning_runs,
    untrainable,
)
from lightning_moe.study.spec import Study, spelled
from lightning_moe.tracking.files import decode_metric, read_events, read_metric_lines

TRAIN_LOSS = "train/loss"
TAIL = 0.1  # last share of a run over which the logged training loss is averaged, at least its last value


@dataclass(frozen=True)
class Results:
    """The numbers of a study.

    Args:
        study: study of the numbers.
        tuning: method → tuned value → validation loss (nats per token), infinite if the run diverged.
        tuned: method → best value.
        rows: row of each method with a finished run, in the order of the file.
        baseline: group of the baseline.
        curves: method → seed → (step, training loss) as logged.
        gaps: method → validation loss − training loss over the last tenth of the run; `None` if none was logged.
        diverged: names of runs that diverged.
        left_out: methods that diverged at every value.
        provenance: name → all values that the runs recorded about where they ran.
        missing: number of compared runs that are not over.
    """

    study: Study
    tuning: Mapping[str, Mapping[float, float]]
    tuned: Mapping[str, float]
    rows: Sequence[GroupResult]
    baseline: Group
    curves: Mapping[str, Mapping[int, Sequence[tuple[int, float]]]]
    gaps: Mapping[str, Estimate | None]
    diverged: Sequence[str]
    left_out: Sequence[str]
    provenance: Mapping[str, Sequence[str]]
    missing: int

    @property
    def example(self) -> Mapping[str, Any]:
        """Summary of a run of the baseline."""
        return next(iter(self.baseline.runs.values())).summary


def read_results(study: Study) -> Results:
    """Collect the results of the finished runs.

    Raises:
        UserError: no run of the baseline is finished, the runs cannot be compared, or they have another configuration
            than the file's.
    """
    tuned, left_out = tuned_values(study), untrainable(study)
    compared = compared_runs(study, tuned)
    for run in [*tuning_runs(study), *compared]:
        configuration(study, run)
    if study.baseline in left_out:
        values = ", ".join(map(spelled, study.tuning.values))
        raise UserError(
            f"{study.path}: the baseline {study.baseline!r} diverged at every {study.tuning.key} of {values}"
        )
    groups: list[Group] = []
    for name in study.methods:
        folders = [run.folder for run in compared if run.method.name == name and run.is_finished]
        if folders:
            found, _ = read_folders(folders)
            groups.append(Group(name, {run.seed: run for run in found}))
    baseline = next((group for group in groups if group.label == study.baseline), None)
    if baseline is None:
        raise UserError(f"{study.folder}: no finished run of the baseline {study.baseline!r} yet")
    check_comparable([run for group in groups for run in group.runs.values()])
    curves = {group.label: {seed: _curve(Path(run.source)) for seed, run in group.runs.items()} for group in groups}
    return Results(
        study,
        tuning_losses(study),
        tuned,
        report.rows(groups, baseline),
        baseline,
        curves,
        {group.label: _gap(group, curves[group.label]) for group in groups},
        [run.name for run in [*tuning_runs(study), *compared] if run.diverged.exists()],
        left_out,
        _provenance([run for run in compared if run.is_finished]),
        (len(study.methods) - len(left_out)) * len(study.seeds) - sum(run.is_over for run in compared),
    )


def _curve(folder: Path) -> list[tuple[int, float]]:
    curve = {}  # a resumed run logs some steps again
    for record, _ in read_metric_lines(folder / METRICS_FILE):
        if TRAIN_LOSS in record:
            curve[int(record["step"])] = decode_metric(record[TRAIN_LOSS])
    return sorted(curve.items())


def _gap(group: Group, curves: Mapping[int, Sequence[tuple[int, float]]]) -> Estimate | None:
    gaps = []
    for seed, run in group.runs.items():
        if curves[seed] and run.summary.get("loss") is not None:
            tail = [loss for step, loss in curves[seed] if step >= (1 - TAIL) * run.summary.get("steps", 0)]
            gaps.append(run.summary["loss"] - fmean(tail or [curves[seed][-1][1]]))
    return estimate(gaps) if gaps else None


def _provenance(runs: Sequence[StudyRun]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for run in runs:
        for event, _ in read_events(run.folder / JOURNAL_FILE):
            if event["event"] == "tags":
                for name, value in event["tags"].items():
                    found.setdefault(name, set()).add(value)
    return {name: sorted(values) for name, values in found.items()}
