"""The loop of a sweep's process: lock trials and follow their runs until the sweep is done."""

from __future__ import annotations

import time
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from lightning_moe.errors import UserError
from lightning_moe.internals.optuna import ignore_stop, reopen_trial
from lightning_moe.sweep.configuration import run_environment
from lightning_moe.sweep.locks import FIRST_TRIAL, LEADER
from lightning_moe.sweep.optuna_study import OpenOptunaStudy, build_sampler, storage_errors
from lightning_moe.sweep.pool import POLL_SECONDS, Pool, say
from lightning_moe.sweep.record import SweepRecord
from lightning_moe.sweep.spec import Sweep
from lightning_moe.sweep.trial import RunningTrial, TrialRun

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

LOOK_SECONDS = 2.0  # between two looks at the trials of other processes
RETRY_SECONDS = 3.0  # between two attempts to reach a storage that does not answer


class SweepLoop:
    """The work of one process on a sweep.

    Args:
        sweep: sweep to work on.
        opened: Optuna study and locks of the sweep.
        record: record of the sweep.
        workers: number of trials at the same time in this process.
    """

    def __init__(self, sweep: Sweep, opened: OpenOptunaStudy, record: SweepRecord, workers: int) -> None:
        self._sweep, self._record, self._workers = sweep, record, workers
        self._optuna_study, self._locks = opened.optuna_study, opened.locks
        self._pool: Pool[TrialRun] = Pool(workers, run_environment(sweep.base))
        self._running: dict[int, RunningTrial] = {}  # by number
        self._next_look = 0.0
        self._away_since: float | None = None  # start of an outage of the storage
        self._waits_for: set[int] = set()  # trials of other processes that were printed
        size = sweep.space.size()
        self._limit = min(sweep.trials, size) if size and sweep.sampler["name"] == "BruteForceSampler" else sweep.trials
        self._deadline = float("inf") if sweep.hours is None else time.monotonic() + 3600 * sweep.hours
        ignore_stop(self._optuna_study)  # `_limit` knows when nothing is left to try

    def run(self) -> None:
        """Work until every trial of the sweep is over, whichever process ran it.

        Raises:
            KeyboardInterrupt: this process's runs were stopped; their trials wait for the next start.
            Exception: one of `storage_errors`: the storage was away for too long, and the runs were stopped, too.
        """
        with self._pool:
            while not self._step_or_wait():
                time.sleep(POLL_SECONDS)

    def _step_or_wait(self) -> bool:
        """Look at everything once; return true when the sweep is done. In an outage of the storage, wait."""
        try:
            done = self._step()
        except storage_errors() as error:
            self._outlast(error)
            return False
        if self._away_since is not None:
            say(f"the sweep's storage answers again, after {time.monotonic() - self._away_since:.0f} s")
            self._away_since = None
        return done

    def _step(self) -> bool:
        """Look at everything. Any line may raise an error of the storage; the next call repeats what is left."""
        for run, outcome in self._pool.poll():
            self._running[run.number].run_ended(outcome)
        for number, trial in [*self._running.items()]:
            if trial.advance():
                self._locks.check()  # a process without the lock must not report
                trial.tell()
                del self._running[number]
                self._next_look = 0.0
                self._locks.unlock(FIRST_TRIAL + number)
        if time.monotonic() < self._next_look:
            return False
        self._locks.check()
        while len(self._running) < self._workers and (found := self._next_trial()) is not None:
            self._running[found.number] = RunningTrial(self._sweep, found, self._record.child_tags, self._pool)
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._record.update()
        return not self._running and self._is_done()

    def _outlast(self, error: Exception) -> None:
        """Wait for the storage while the runs go on, and take the locks of their trials again."""
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            if self._locks.patience:
                minutes = self._locks.patience / 60
                say(f"the sweep's storage does not answer: waiting, {minutes:g} minutes at most; runs go on")
        if now >= self._away_since + self._locks.patience:
            raise error
        time.sleep(RETRY_SECONDS)
        try:
            leader = [LEADER] if self._record.is_leader else []
            taken = self._locks.renew([*(FIRST_TRIAL + number for number in self._running), *leader])
        except ConnectionError:
            return
        if LEADER in taken:
            self._record.resign()
        for number in (lock - FIRST_TRIAL for lock in taken - {LEADER}):
            say(f"trial {number}: another process took it up meanwhile; stopped here")
            self._running.pop(number).drop()

    def _next_trial(self) -> Trial | None:
        """Lock an abandoned trial, or else a new one; return `None` if there is nothing to do."""
        from optuna.trial import TrialState

        with self._locks.mutex():
            trials = self._trials()
            for frozen in trials:
                is_open = frozen.state == TrialState.RUNNING and frozen.number not in self._running
                if is_open and not self._locks.in_grace_period() and self._take(frozen.number):
                    say(f"trial {frozen.number}: taken up again, its process is gone")
                    self._optuna_study.sampler = build_sampler(self._sweep, frozen.number)
                    trial = reopen_trial(self._optuna_study, frozen)
                    break
            else:
                if len(trials) >= self._limit or time.monotonic() > self._deadline:
                    return None
                self._optuna_study.sampler = build_sampler(self._sweep, len(trials))
                trial = self._optuna_study.ask()
                self._locks.lock(FIRST_TRIAL + trial.number)
            try:
                self._sweep.space.sample(trial)
            except UnpicklingError as error:
                raise UserError(f"{self._sweep.path}: sampler: its state in the storage {error}") from None
            return trial

    def _take(self, number: int) -> bool:
        if not self._locks.try_lock(FIRST_TRIAL + number):
            return False
        if not self._trials()[number].state.is_finished():
            return True
        # the holder may have reported the end after our first look at the trials
        self._locks.unlock(FIRST_TRIAL + number)
        return False

    def _is_done(self) -> bool:
        trials = self._trials()
        unfinished = {trial.number for trial in trials if not trial.state.is_finished()}
        for number in unfinished - self._waits_for:
            say(f"waiting for trial {number} ({self._locks.holder(FIRST_TRIAL + number)})")
        self._waits_for |= unfinished
        return not unfinished and (len(trials) >= self._limit or time.monotonic() > self._deadline)

    def _trials(self) -> list[FrozenTrial]:
        return self._optuna_study.get_trials(deepcopy=False)
