"""A study from its file to its page."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from lightning_moe.errors import UserError
from lightning_moe.processes import sigterm_interrupts
from lightning_moe.study.runs import compared_runs, layers, train, tuned_values, tuning_runs, untrainable
from lightning_moe.study.spec import Study
from lightning_moe.sweep.locks import LEADER, FileLocks
from lightning_moe.sweep.pool import say
from lightning_moe.trust import folder_fact, refuse_links_out, remember


def run_study(study: Study, workers: int = 1, report_only: bool = False, page: Path | None = None) -> None:
    """Train what is missing of a study, then write its page and log it to MLflow.

    Args:
        study: study, see `spec.read_study`.
        workers: number of runs at the same time.
        report_only: whether to train nothing.
        page: Markdown file, see `page.write_page`; `None` for ``results.md`` in the study's folder.

    Raises:
        UserError: bad input, before the first run; failed runs, after all others and the page; or no page.
        KeyboardInterrupt: Ctrl-C, or SIGTERM (then its argument is the signal); the runs were stopped, to continue.
    """
    from lightning_moe.study.page import check_page, description, write_page
    from lightning_moe.study.record import log_page
    from lightning_moe.study.results import read_results

    for folder in (study.folder, *(study.folder / stage for stage in ("tune", "compare"))):
        refuse_links_out(folder, "give the study another name with --name")
        remember(folder_fact(folder))
    page = page or study.folder / "results.md"
    check_page(study, page)
    failures = [] if report_only else _train(study, workers)
    failed = f"{len(failures)} runs failed; the same command tries them again:\n  " + "\n  ".join(failures)
    try:
        results = read_results(study)
        written = write_page(results, page)
    except UserError as error:
        raise UserError(f"{error}\n{failed}" if failures else str(error)) from None
    for path in written:
        say(f"written: {path}")
    if (address := log_page(study, written, description(results))) is not None:
        say(f"in MLflow: {address}")
    if failures:
        raise UserError(failed)


def _train(study: Study, workers: int) -> list[str]:
    """Tune and compare; return a line for each run that failed."""
    from lightning_moe.training.parse import parse  # torch and lightning: seconds

    any_value = dict.fromkeys(study.methods, study.tuning.values[0])
    for run in compared_runs(study, any_value)[: len(study.methods)]:
        parse(layers(study, run))  # all methods are checked before anything is written
    with sigterm_interrupts(), closing(FileLocks(study.folder / "study.lock")) as locks:
        if not locks.try_lock(LEADER):
            raise UserError(f"{study.folder}: {locks.holder(LEADER)} works on this study; wait for its end")
        failures = train(study, "tune", tuning_runs(study), workers)
        for name in untrainable(study):
            say(f"{name}: left out, as every {study.tuning.key} diverged")
        return failures + train(study, "compare", compared_runs(study, tuned_values(study)), workers)
