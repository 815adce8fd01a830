"""A sweep from its file to its report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing

from lightning_moe.errors import UserError
from lightning_moe.processes import garbage_kept, sigterm_interrupts
from lightning_moe.sweep import report
from lightning_moe.sweep.loop import Loop
from lightning_moe.sweep.optuna_study import check_methods, has_storage, open_study, storage_errors
from lightning_moe.sweep.record import SweepRecord
from lightning_moe.sweep.spec import Sweep
from lightning_moe.sweep.trial import FIT
from lightning_moe.tracking.store import redact


def run_sweep(sweep: Sweep, workers: int = 1, say: Callable[[str], None] = print, fit: Sequence[str] = FIT) -> None:
    """Work on a sweep until it is done; call it again, anywhere, to go on with what is left.

    Args:
        sweep: see `spec.read_sweep`.
        workers: trials at the same time.
        say: tells the user a line.
        fit: the command that trains, before its options.

    Raises:
        UserError: bad input, before the first trial.
        KeyboardInterrupt: Ctrl-C, or SIGTERM (then its argument is the signal); what ran was stopped and waits.
    """
    check_methods(sweep)
    checked = not has_storage(sweep)
    if checked:  # what is refused leaves nothing behind
        _check(sweep, fit, say)
    opened = open_study(sweep)
    record = SweepRecord(sweep, opened, say)
    complete = False
    with sigterm_interrupts(), closing(opened.claims):
        try:
            try:
                if opened.study.get_trials(deepcopy=False):
                    time.sleep(opened.claims.start_delay())
                elif not checked:
                    _check(sweep, fit, say)
                record.open()
                record.wait_for_parent()
                Loop(sweep, opened, record, workers, say, fit).run()
                complete = True
            finally:
                record.finish(complete)
        except storage_errors() as error:
            raise UserError(
                f"{sweep.path}: storage={redact(sweep.storage or 'study.db')!r}: does not answer any more "
                f"({type(error).__name__}). What ran was stopped; the same command goes on from there."
            ) from error
    say(f"\n{report.text(sweep, opened.study)}")
    if address := record.address():
        say(f"In MLflow (python -m lightning_moe ui): {address}")


def _check(sweep: Sweep, fit: Sequence[str], say: Callable[[str], None]) -> None:
    say(f"{sweep.path}: checking the space, then a first run of two steps")
    with garbage_kept():
        from lightning_moe.sweep.configuration import check_space  # torch and lightning: seconds
    from lightning_moe.sweep.probe import probe

    check_space(sweep)
    probe(sweep, fit)
