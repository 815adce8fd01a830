"""The page of a study: tables and figures of the runs that are there."""

from __future__ import annotations

from pathlib import Path

from lightning_moe.atomic import write_atomically
from lightning_moe.compare import report
from lightning_moe.compare.groups import Group
from lightning_moe.compare.runs import read_folders
from lightning_moe.errors import UserError
from lightning_moe.study.runs import compared_runs, tuned_values
from lightning_moe.study.spec import Study
from lightning_moe.sweep.results import is_finished


def write_page(study: Study, page: Path) -> list[Path]:
    """Write the table of the methods.

    Raises:
        UserError: no run of the baseline is finished.
    """
    groups = []
    for name in study.methods:
        runs = [run for run in compared_runs(study, tuned_values(study)) if run.method.name == name]
        finished = [run for run in runs if is_finished(run.run)]
        if finished:
            found, _ = read_folders([run.run for run in finished])
            groups.append(Group(name, {run.seed: run for run in found}))
    baseline = next((group for group in groups if group.label == study.baseline), None)
    if baseline is None:
        raise UserError(f"{study.folder}: no finished run of the baseline {study.baseline!r} yet")
    write_atomically(page, report.markdown(report.rows(groups, baseline), baseline, []).encode())
    return [page]
