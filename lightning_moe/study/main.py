"""A study from its file to its page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_moe.errors import UserError
from lightning_moe.processes import sigterm_interrupts
from lightning_moe.study.runs import StudyLoop, compared_runs, layers, tuned_values, tuning_runs, untrainable
from lightning_moe.study.spec import Study
from lightning_moe.sweep.trial import FIT


def run_study(
    study: Study,
    workers: int = 1,
    report_only: bool = False,
    page: Path | None = None,
    say: Callable[[str], None] = print,
    fit: Sequence[str] = FIT,
) -> None:
    """Train what is missing of a study, then write its page and log it to MLflow.

    Args:
        study: see `spec.read_study`.
        workers: runs at the same time.
        report_only: train nothing.
        page: see `page.write_page`; null: ``results.md`` in the study's folder.
        say: tells the user a line.
        fit: the command that trains, before its options.

    Raises:
        UserError: bad input, before the first run; failed runs, after all others and the page, or no page.
        KeyboardInterrupt: Ctrl-C, or SIGTERM (then its argument is the signal); what ran was stopped and waits.
    """
    from filelock import FileLock, Timeout

    from lightning_moe.study.page import check_page, write_page
    from lightning_moe.study.record import log_page

    page, failures = page or study.folder / "results.md", []
    check_page(study, page)
    if not report_only:
        study.folder.mkdir(parents=True, exist_ok=True)
        try:
            with sigterm_interrupts(), FileLock(study.folder / "study.lock", timeout=0):
                failures = _train(study, StudyLoop(study, workers, say, fit), say)
        except Timeout:
            raise UserError(f"{study.folder}: another process works on this study") from None
    failed = f"{len(failures)} runs failed; the same command tries them again:\n  " + "\n  ".join(failures)
    try:
        written = write_page(study, page)
    except UserError as error:
        raise UserError(f"{error}\n{failed}" if failures else str(error)) from None
    for path in written:
        say(f"written: {path}")
    if (address := log_page(study, written)) is not None:
        say(f"in MLflow: {address}")
    if failures:
        raise UserError(failed)


def _train(study: Study, loop: StudyLoop, say: Callable[[str], None]) -> list[str]:
    from lightning_moe.training.parse import parse  # torch and lightning: seconds

    any_value = dict.fromkeys(study.methods, study.tuning.values[0])
    for run in compared_runs(study, any_value)[: len(study.methods)]:
        parse(layers(study, run))  # all methods are checked before the first run
    failures = loop.run("tune", tuning_runs(study))
    for name in untrainable(study):
        say(f"{name}: left out, as every {study.tuning.key} diverged")
    return failures + loop.run("compare", compared_runs(study, tuned_values(study)))
