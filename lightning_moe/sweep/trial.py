"""One trial while it runs: one ``fit`` per seed, one after the other, and its reports to Optuna."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_moe.errors import UserError
from lightning_moe.filenames import JOURNAL_FILE
from lightning_moe.sweep.pool import Outcome, Pool, PoolRun, say
from lightning_moe.sweep.results import MetricFollower, final_values
from lightning_moe.sweep.spec import Sweep
from lightning_moe.tracking.files import LineFile

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial


@dataclass(frozen=True)
class TrialRun(PoolRun):
    """One run of a trial.

    Args:
        number: number of the trial.
        seed: seed of the run.
    """

    number: int
    seed: int

    @classmethod
    def of(cls, sweep: Sweep, number: int, seed: int) -> TrialRun:
        """Name the run of a trial with a seed."""
        return cls(sweep.folder, f"trial-{number:04d}-s{seed}", number, seed)

    @property
    def command(self) -> str:
        """Command that trains the same configuration by hand, as a run outside of the sweep."""
        return f"python -m lightning_moe fit --config {shlex.quote(str(self.config))}"


@dataclass(frozen=True)
class End:
    """How a trial ended.

    Args:
        state: state in Optuna's words: ``COMPLETE``, ``PRUNED`` or ``FAIL``.
        text: scores, or the reason.
        run: run that decided.
        values: values of the objectives, if the trial is complete.
        attributes: user attributes for Optuna.
    """

    state: str
    text: str
    run: TrialRun
    values: Sequence[float] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


def sampled_text(values: Mapping[str, Any]) -> str:
    """Spell a trial's values by the last parts of their keys, such as ``muon_lr=0.02, capacity=free``."""
    return ", ".join(
        f"{key.rpartition('.')[2]}={value:.4g}" if isinstance(value, float) else f"{key.rpartition('.')[2]}={value}"
        for key, value in values.items()
    )


class RunningTrial:
    """A trial whose lock this process has. Call `advance` until it returns true, then `tell`.

    An error of the storage in either loses nothing: the next call repeats what is left.

    Args:
        sweep: sweep of the trial.
        trial: Optuna's trial, with all values sampled.
        tags: tags of its MLflow runs.
        pool: pool that runs it.
    """

    def __init__(self, sweep: Sweep, trial: Trial, tags: Mapping[str, str], pool: Pool[TrialRun]) -> None:
        self.number = trial.number
        self._sweep, self._trial, self._tags, self._pool = sweep, trial, tags, pool
        self._waiting = [TrialRun.of(sweep, trial.number, seed) for seed in sweep.seeds]
        self._done: list[TrialRun] = []
        self._is_running = self._is_pruned = False
        self._outcome: Outcome | None = None
        self._end: End | None = None
        self._unreported: list[tuple[int, float]] = []
        self._follower = MetricFollower(self._waiting[0].folder, next(iter(sweep.objectives)))
        self._reported = set(self._stored().intermediate_values)

    def run_ended(self, outcome: Outcome) -> None:
        """Remember the outcome of the trial's run, which `Pool.poll` returned."""
        self._outcome = outcome

    def drop(self) -> None:
        """Stop the run and wait for its end; the trial stays open for the process that has its lock now."""
        if self._is_running:
            self._pool.drop(self._waiting[0])

    def advance(self) -> bool:
        """Report new values, start the next run when one has ended; return true once the trial is over."""
        if self._end is None:
            self._end = self._advance()
        return self._end is not None

    def _advance(self) -> End | None:
        if not self._is_running:
            return self._start_next()
        if not self._done and not self._is_pruned and self._sweep.pruner is not None:
            self._report()
        outcome = self._outcome
        if outcome is None:
            return None
        self._is_running, self._outcome = False, None
        run = self._waiting[0]
        if outcome.kind == "finished":
            return self._start_next()
        if outcome.kind == "stopped":
            return End("PRUNED", f"pruned at step {max(self._reported, default=0)}", run)
        counts_as_bad = outcome.kind == "diverged" and len(self._sweep.objectives) == 1
        return End("PRUNED" if counts_as_bad else "FAIL", f"{outcome.kind}: {outcome.reason}", run)

    def _start_next(self) -> End | None:
        while (
            self._waiting and self._waiting[0].is_finished
        ):  # just now, or by a process that was killed before its report
            self._done.append(self._waiting.pop(0))
        if not self._waiting:
            return self._complete()
        run = self._waiting[0]
        if not run.has_own_config():
            from lightning_moe.sweep.configuration import write_trial_config  # torch and lightning: seconds

            try:
                write_trial_config(self._sweep, dict(self._trial.params), run.seed, run.config)
            except UserError as error:
                run.log.write_text(f"error: {error}\n")
                return End("FAIL", f"failed: {error}", run)
        say(f"trial {run.number}, seed {run.seed}: runs; by hand, as a run of its own: {run.command}")
        self._pool.start(run, {**self._tags, "trial": str(run.number), "sampled": sampled_text(self._trial.params)})
        self._is_running = True
        return None

    def _report(self) -> None:
        """Report the new metrics of the first seed's run, and stop it if the pruner says so."""
        self._unreported += self._follower.new_values()
        while self._unreported:
            step, value = self._unreported[0]
            if step not in self._reported and not math.isnan(value):  # a resumed run repeats some steps
                self._trial.report(value, step)
                self._reported.add(step)
                if self._trial.should_prune():
                    self._is_pruned = True
                    self._pool.stop(self._waiting[0])
                    return
            self._unreported.pop(0)

    def _complete(self) -> End:
        per_seed = {run.seed: final_values(run.folder) for run in self._done}
        means: list[float] = []
        attributes: dict[str, Any] = {}
        for metric in self._sweep.objectives:
            values = {seed: found[metric] for seed, found in per_seed.items() if metric in found}
            if len(values) < len(per_seed):
                return End("FAIL", f"failed: objective {metric!r} was not logged", self._done[0])
            means.append(statistics.fmean(values.values()))
            if len(values) > 1:
                attributes[f"{metric} by seed"] = values
                attributes[f"{metric} standard deviation"] = statistics.stdev(values.values())
        scores = ", ".join(f"{metric} {value:.5g}" for metric, value in zip(self._sweep.objectives, means, strict=True))
        return End("COMPLETE", scores, self._done[0], means, attributes)

    def tell(self) -> None:
        """Report the end of the trial to Optuna, the user and the run's record."""
        from optuna.trial import TrialState

        end = self._end
        assert end is not None
        attributes, where = dict(end.attributes), ""
        if end.values is None:
            attributes |= {"end": end.text, "log": str(end.run.log)}
            where = f" (log: {end.run.log})"
        if not self._stored().state.is_finished():  # otherwise the storage has it, and only its answer was lost
            for name, value in attributes.items():
                self._trial.set_user_attr(name, value)
            self._trial.study.tell(self.number, end.values, state=TrialState[end.state])
        say(f"trial {self.number}: {end.text}{where}")
        if end.values is None and (end.run.folder / JOURNAL_FILE).exists():
            journal = LineFile(end.run.folder / JOURNAL_FILE)
            journal.drop_partial_line()
            journal.append({"event": "tags", "time": end.run.log.stat().st_mtime, "tags": {"trial_end": end.text}})
            journal.close()

    def _stored(self) -> FrozenTrial:
        """Read the current trial from the storage."""
        return self._trial.study.get_trials(deepcopy=False)[self.number]
