"""The loop of a sweep's process: claim trials, look after their runs, until the study is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lightning_moe.sweep.claims import FIRST_TRIAL, SCRIBE
from lightning_moe.sweep.optuna_study import OpenStudy, build_sampler, storage_errors
from lightning_moe.sweep.process import slot_environment, visible_gpus
from lightning_moe.sweep.record import SweepRecord
from lightning_moe.sweep.spec import Sweep
from lightning_moe.sweep.trial import FIT, RunningTrial

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

POLL_SECONDS = 0.3  # between two looks at the own runs
LOOK_SECONDS = 2.0  # between two looks at what other processes of the study do
RETRY_SECONDS = 3.0  # between two attempts to reach a storage that does not answer


class Loop:
    """Works on a study until all its trials are over.

    Args:
        sweep: the sweep.
        opened: its study.
        record: the sweep's own record.
        workers: trials at the same time in this process.
        say: tells the user a line.
        fit: the command that trains, before its options.
    """

    def __init__(
        self,
        sweep: Sweep,
        opened: OpenStudy,
        record: SweepRecord,
        workers: int,
        say: Callable[[str], None] = print,
        fit: Sequence[str] = FIT,
    ) -> None:
        self._sweep, self._study, self._claims, self._record = sweep, opened.study, opened.claims, record
        self._say, self._fit = say, fit
        self._slots: list[RunningTrial | None] = [None] * workers
        self._gpus = visible_gpus()
        self._next_look = 0.0
        self._away_since: float | None = None  # when the storage did not answer first, in an outage
        size = sweep.space.size()
        self._limit = min(sweep.trials, size) if size and sweep.sampler["name"] == "BruteForceSampler" else sweep.trials
        self._deadline = float("inf") if sweep.hours is None else time.monotonic() + 3600 * sweep.hours
        # samplers call it when nothing is left to try, an error outside of Optuna's own loop; `_limit` knows that
        self._study.stop = lambda: None  # type: ignore[method-assign]

    def run(self) -> None:
        """Returns when every trial of the study is over, whoever ran it.

        Raises:
            KeyboardInterrupt: the own runs were stopped; their trials wait for the next start.
            Exception: one of `storage_errors`, as with an interrupt; the storage was away for longer than it may be.
        """
        try:
            while not self._step_or_wait():
                time.sleep(POLL_SECONDS)
        finally:
            mine = [running for running in self._slots if running is not None]
            for running in mine:
                running.ask_to_stop()
            for running in mine:
                running.wait_or_kill()

    def _step_or_wait(self) -> bool:
        """One look at everything; true when the study is done. In an outage of the storage it waits."""
        try:
            done = self._step()
        except storage_errors() as error:
            self._outlast(error)
            return False
        if self._away_since is not None:
            self._say(f"the study's storage answers again, after {time.monotonic() - self._away_since:.0f} s")
            self._away_since = None
        return done

    def _step(self) -> bool:
        """Anything may raise an error of the storage in the middle, and is done again by the next call."""
        for index, running in enumerate(self._slots):
            if running is not None and running.poll():
                self._claims.check()  # whoever lost its lock has lost its say
                running.tell()
                self._slots[index] = None
                self._next_look = 0.0
                self._claims.unlock(FIRST_TRIAL + running.number)
        if time.monotonic() < self._next_look:
            return False
        self._claims.check()
        self._fill()
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._record.update()
        return not any(self._slots) and self._is_done()

    def _outlast(self, error: Exception) -> None:
        """Wait for the storage, while the own runs go on, and take their locks again."""
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            if self._claims.patience:
                minutes = self._claims.patience / 60
                self._say(f"the study's storage does not answer: waiting, {minutes:g} minutes at most; runs go on")
        if now >= self._away_since + self._claims.patience:
            raise error
        time.sleep(RETRY_SECONDS)
        slots = {FIRST_TRIAL + running.number: i for i, running in enumerate(self._slots) if running is not None}
        try:
            taken = self._claims.renew([*slots, *([SCRIBE] if self._record.is_scribe else [])])
        except ConnectionError:
            return
        for number in taken - {SCRIBE}:
            running = self._slots[slots[number]]
            assert running is not None
            self._say(f"trial {running.number}: another process took it up meanwhile; stopped here")
            running.ask_to_stop()
            running.wait_or_kill()
            self._slots[slots[number]] = None
        if SCRIBE in taken:
            self._record.resign()

    def _fill(self) -> None:
        for index, running in enumerate(self._slots):
            if running is None:
                trial = self._claim()
                if trial is None:
                    return
                environment = slot_environment(index, len(self._slots), self._gpus)
                self._slots[index] = RunningTrial(
                    self._sweep, trial, self._record.child_tags, environment, self._say, self._fit
                )

    def _claim(self) -> Trial | None:
        """An abandoned trial, else a new one; null where there is nothing to do."""
        from optuna.trial import TrialState

        with self._claims.turn():
            trials = self._trials()
            mine = {running.number for running in self._slots if running is not None}
            for frozen in trials:
                open_ = frozen.state == TrialState.RUNNING and frozen.number not in mine
                if open_ and self._claims.settled() and self._take(frozen):
                    return self._adopt(frozen)
            if len(trials) >= self._limit or time.monotonic() > self._deadline:
                return None
            self._study.sampler = build_sampler(self._sweep, len(trials))
            trial = self._study.ask()
            self._claims.lock(FIRST_TRIAL + trial.number)
            self._sweep.space.sample(trial)
            return trial

    def _take(self, frozen: FrozenTrial) -> bool:
        if not self._claims.try_lock(FIRST_TRIAL + frozen.number):
            return False
        # Who had the lock may have told the study the end just now, after `frozen` was read.
        if not self._study._storage.get_trial(frozen._trial_id).state.is_finished():
            return True
        self._claims.unlock(FIRST_TRIAL + frozen.number)
        return False

    def _adopt(self, frozen: FrozenTrial) -> Trial:
        from optuna.trial import Trial

        self._say(f"trial {frozen.number}: taken up again, its process is gone")
        self._study.sampler = build_sampler(self._sweep, frozen.number)
        trial = Trial(self._study, frozen._trial_id)
        self._sweep.space.sample(trial)  # gives back what is sampled already
        return trial

    def _is_done(self) -> bool:
        trials = self._trials()
        over_time = time.monotonic() > self._deadline
        return all(t.state.is_finished() for t in trials) and (len(trials) >= self._limit or over_time)

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)
