"""A sweep from its file to its report."""

from __future__ import annotations

import time
from contextlib import closing

from lightning_moe.errors import UserError
from lightning_moe.processes import garbage_kept, sigterm_interrupts
from lightning_moe.redaction import redact
from lightning_moe.sweep import report
from lightning_moe.sweep.loop import SweepLoop
from lightning_moe.sweep.optuna_study import (
    OpenOptunaStudy,
    check_methods,
    has_storage,
    open_optuna_study,
    storage_errors,
)
from lightning_moe.sweep.pool import say
from lightning_moe.sweep.record import SweepRecord
from lightning_moe.sweep.spec import Sweep
from lightning_moe.trust import folder_fact, refuse_links_out, remember


def run_sweep(sweep: Sweep, workers: int = 1) -> None:
    """Work on a sweep until it is done; call it again, on any machine, to continue.

    Args:
        sweep: sweep, see `spec.read_sweep`.
        workers: number of trials at the same time.

    Raises:
        UserError: bad input, before the first trial; or a storage that stays away.
        KeyboardInterrupt: Ctrl-C, or SIGTERM (then its argument is the signal); the runs were stopped, to continue.
    """
    check_methods(sweep)
    refuse_links_out(sweep.folder, "give the sweep another name with --name")
    with sigterm_interrupts():
        is_checked = not has_storage(sweep)
        if is_checked:  # a refused sweep leaves no folder
            _check(sweep)
        opened = open_optuna_study(sweep)
        remember(folder_fact(sweep.folder))
        record = SweepRecord(sweep, opened)
        with closing(opened.locks):
            try:
                _run(sweep, opened, record, workers, is_checked)
            except storage_errors() as error:
                raise UserError(
                    f"{sweep.path}: storage={redact(sweep.storage or 'study.db')!r}: does not answer any more "
                    f"({type(error).__name__}). What ran was stopped; the same command goes on from there."
                ) from error
    say(f"\n{report.text(sweep, opened.optuna_study)}")
    if address := record.address():
        say(f"In MLflow (python -m lightning_moe ui): {address}")


def _run(sweep: Sweep, opened: OpenOptunaStudy, record: SweepRecord, workers: int, is_checked: bool) -> None:
    complete = False
    try:
        if opened.optuna_study.get_trials(deepcopy=False):
            time.sleep(opened.locks.grace_after_server_start())
        elif not is_checked:
            _check(sweep)
        record.open()
        record.wait_for_parent()
        SweepLoop(sweep, opened, record, workers).run()
        complete = True
    finally:
        record.finish(complete)


def _check(sweep: Sweep) -> None:
    say(f"{sweep.path}: checking the space, then a first run of two steps")
    with garbage_kept():
        from lightning_moe.sweep.configuration import check_space  # torch and lightning: seconds
    from lightning_moe.sweep.probe import probe

    check_space(sweep)
    probe(sweep)
