"""One trial while it runs: a ``fit`` per seed, one after the other, and what Optuna is told of them."""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moe.errors import UserError
from lightning_moe.filenames import JOURNAL_FILE
from lightning_moe.sweep.files import RunFiles
from lightning_moe.sweep.process import FitProcess
from lightning_moe.sweep.results import MetricFollower, final_values, is_finished, last_line
from lightning_moe.sweep.spec import Sweep
from lightning_moe.tracking.files import LineFile

if TYPE_CHECKING:
    from optuna.trial import Trial

DIVERGED = 3  # exit code of ``fit``
FIT = (sys.executable, "-m", "lightning_moe", "fit")


@dataclass(frozen=True)
class TrialFiles(RunFiles):
    """One run of a trial.

    Args:
        seed: the run's.
    """

    seed: int

    @classmethod
    def of(cls, sweep_folder: Path, number: int, seed: int) -> TrialFiles:
        """The run of the trial ``number`` with ``seed``."""
        return cls(sweep_folder, f"trial-{number:04d}-s{seed}", seed)

    @property
    def command(self) -> str:
        """Trains the same configuration by hand, as a run outside of the sweep."""
        return f"python -m lightning_moe fit --config {shlex.quote(str(self.config))}"


@dataclass(frozen=True)
class End:
    """How a trial ended.

    Args:
        state: Optuna's word: ``COMPLETE``, ``PRUNED`` or ``FAIL``.
        text: the scores; else the reason.
        files: of the run that decided.
        values: of the objectives, where it is complete.
        attributes: what else the study keeps of it.
    """

    state: str
    text: str
    files: TrialFiles
    values: Sequence[float] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


class RunningTrial:
    """A trial that this process has claimed; call `poll` until it returns true, and `tell`.

    Args:
        sweep: the sweep.
        trial: Optuna's trial, with all values sampled.
        tags: of its MLflow runs.
        environment: for its processes.
        say: tells the user a line.
        fit: the command that trains, before its options.
    """

    def __init__(
        self,
        sweep: Sweep,
        trial: Trial,
        tags: Mapping[str, str],
        environment: Mapping[str, str],
        say: Callable[[str], None] = print,
        fit: Sequence[str] = FIT,
    ) -> None:
        self.sweep, self.trial, self.number = sweep, trial, trial.number
        self._tags, self._environment, self._say, self._fit = tags, environment, say, fit
        self._waiting = [TrialFiles.of(sweep.folder, trial.number, seed) for seed in sweep.seeds]
        self._done: list[TrialFiles] = []
        self._process: FitProcess | None = None
        self._pruning = False
        self._end: End | None = None
        self._unreported: list[tuple[int, float]] = []
        self._follower = MetricFollower(self._waiting[0].run, next(iter(sweep.objectives)))
        self._reported = set(trial.storage.get_trial(trial._trial_id).intermediate_values)

    def poll(self) -> bool:
        """Look after the trial; true once it is over, and `tell` is due.

        An error of the storage, here or in `tell`, loses nothing: the next call does again what is left to do.
        """
        if self._end is None:
            self._end = self._look()
        return self._end is not None

    def _look(self) -> End | None:
        if self._process is None:
            return self._start_next()
        if not self._done and not self._pruning and self.sweep.pruner is not None:
            self._report()
        code = self._process.exit_code()
        if code is None:
            return None
        self._process = None
        files = self._waiting[0]
        if is_finished(files.run) and code == 0:
            return self._start_next()
        if self._pruning:
            return End("PRUNED", f"pruned at step {max(self._reported, default=0)}", files)
        if code == DIVERGED and len(self.sweep.objectives) == 1:
            return End("PRUNED", f"diverged: {last_line(files.log)}", files)
        how = (
            f"ended by signal {-code}" + (", out of memory?" if code == -9 else "") if code < 0 else f"exit code {code}"
        )
        return End("FAIL", f"failed: {how}: {last_line(files.log)}", files)

    def ask_to_stop(self) -> None:
        """Stop the run; the trial stays open, and whoever claims it next goes on from its last checkpoint."""
        if self._process is not None:
            self._process.ask_to_stop()

    def wait_or_kill(self) -> None:
        """Wait for what `ask_to_stop` began."""
        if self._process is not None:
            self._process.wait_or_kill()

    def _start_next(self) -> End | None:
        if not self._waiting:
            return self._complete()
        files = self._waiting[0]
        if is_finished(files.run):  # just now, or by a process that was killed before it could say so
            self._done.append(self._waiting.pop(0))
            return self._start_next()
        if not files.config.exists():
            from lightning_moe.sweep.configuration import write_trial_config  # torch and lightning: seconds

            try:
                write_trial_config(self.sweep, dict(self.trial.params), files.seed, files.config)
            except UserError as error:
                files.log.write_text(f"error: {error}\n")
                return End("FAIL", f"failed: {error}", files)
        self._say(f"trial {self.number}, seed {files.seed}: runs; by hand, as a run of its own: {files.command}")
        options = ["--config", str(files.config), "--output_dir", str(self.sweep.folder), "--run_name", files.name]
        tags = {**self._tags, "trial": str(self.number)}
        options += ["--ckpt_path", "last", f"--tracking.tags={json.dumps(tags)}"]
        self._process = FitProcess([*self._fit, *options], files.run, files.log, self._environment)
        return None

    def _report(self) -> None:
        """Pass on what the first seed's run has logged since, and stop it where the pruner says so."""
        self._unreported += self._follower.new_values()
        while self._unreported:
            step, value = self._unreported[0]
            if step not in self._reported and not math.isnan(value):  # a resumed run repeats some steps
                self.trial.report(value, step)
                self._reported.add(step)
                if self.trial.should_prune():
                    self._pruning = True
                    self.ask_to_stop()
                    return
            self._unreported.pop(0)

    def _complete(self) -> End:
        per_seed = {files.seed: final_values(files.run) for files in self._done}
        means: list[float] = []
        attributes: dict[str, Any] = {}
        for metric in self.sweep.objectives:
            values = {seed: found[metric] for seed, found in per_seed.items() if metric in found}
            if len(values) < len(per_seed):
                return End("FAIL", f"failed: objective {metric!r} was not logged", self._done[0])
            means.append(statistics.fmean(values.values()))
            if len(values) > 1:
                attributes[f"{metric} by seed"] = values
                attributes[f"{metric} standard deviation"] = statistics.stdev(values.values())
        scores = ", ".join(f"{metric} {value:.5g}" for metric, value in zip(self.sweep.objectives, means, strict=True))
        return End("COMPLETE", scores, self._done[0], means, attributes)

    def tell(self) -> None:
        """Have the study know how the trial ended."""
        from optuna.trial import TrialState

        end = self._end
        assert end is not None
        state = TrialState[end.state]
        attributes = dict(end.attributes)
        if end.values is None:
            attributes |= {"end": end.text, "log": str(end.files.log)}
        # finished already: the storage took it, and only its answer was lost
        if not self.trial.storage.get_trial(self.trial._trial_id).state.is_finished():
            for name, value in attributes.items():
                self.trial.set_user_attr(name, value)
            self.trial.study.tell(self.number, end.values, state=state)
        where = "" if end.values is not None else f" (log: {end.files.log})"
        self._say(f"trial {self.number}: {end.text}{where}")
        if end.values is None and (end.files.run / JOURNAL_FILE).exists():
            journal = LineFile(end.files.run / JOURNAL_FILE)
            journal.append({"event": "tags", "time": end.files.log.stat().st_mtime, "tags": {"trial_end": end.text}})
            journal.close()
