"""One trial while it runs: a ``fit`` per seed, one after the other, and what Optuna is told of them."""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_moe.errors import UserError
from lightning_moe.sweep.process import FitProcess
from lightning_moe.sweep.results import MetricFollower, final_values, is_finished, last_line
from lightning_moe.sweep.spec import Sweep
from lightning_moe.tracking.files import JOURNAL_FILE, LineFile

if TYPE_CHECKING:
    from optuna.trial import Trial

DIVERGED = 3  # exit code of ``fit``
FIT = (sys.executable, "-m", "lightning_moe", "fit")


@dataclass(frozen=True)
class TrialFiles:
    """Where one run of a trial is kept.

    Args:
        sweep_folder: the sweep's.
        number: the trial's.
        seed: the run's.
    """

    sweep_folder: Path
    number: int
    seed: int

    @property
    def name(self) -> str:
        return f"trial-{self.number:04d}-s{self.seed}"

    @property
    def run(self) -> Path:
        return self.sweep_folder / self.name

    @property
    def config(self) -> Path:
        return self.sweep_folder / f"{self.name}.yaml"

    @property
    def log(self) -> Path:
        return self.sweep_folder / f"{self.name}.log"

    @property
    def command(self) -> str:
        """Runs the same configuration by hand."""
        return f"python -m lightning_moe fit --config {shlex.quote(str(self.config))}"


class RunningTrial:
    """A trial that this process has claimed; call `poll` until it returns true.

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
        self._waiting = [TrialFiles(sweep.folder, trial.number, seed) for seed in sweep.seeds]
        self._done: list[TrialFiles] = []
        self._process: FitProcess | None = None
        self._pruning = False
        self._follower = MetricFollower(self._waiting[0].run, next(iter(sweep.objectives)))
        self._reported = set(trial.storage.get_trial(trial._trial_id).intermediate_values)

    def poll(self) -> bool:
        """Look after the trial; true once it is over and the study knows how it ended."""
        if self._process is None:
            return self._start_next()
        if not self._done and not self._pruning and self.sweep.pruner is not None:
            self._report()
        code = self._process.exit_code()
        if code is None:
            return False
        self._process = None
        files = self._waiting[0]
        if is_finished(files.run) and code == 0:
            return self._start_next()
        if self._pruning:
            return self._tell_pruned(f"pruned at step {max(self._reported, default=0)}", files)
        if code == DIVERGED and len(self.sweep.objectives) == 1:
            return self._tell_pruned(f"diverged: {last_line(files.log)}", files)
        how = (
            f"ended by signal {-code}" + (", out of memory?" if code == -9 else "") if code < 0 else f"exit code {code}"
        )
        return self._tell_failed(f"{how}: {last_line(files.log)}", files)

    def ask_to_stop(self) -> None:
        """Stop the run; the trial stays open, and whoever claims it next goes on from its last checkpoint."""
        if self._process is not None:
            self._process.ask_to_stop()

    def wait_or_kill(self) -> None:
        """Wait for what `ask_to_stop` began."""
        if self._process is not None:
            self._process.wait_or_kill()

    def _start_next(self) -> bool:
        if not self._waiting:
            return self._tell_complete()
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
                return self._tell_failed(str(error), files)
        self._say(f"trial {self.number}, seed {files.seed}: {files.command}")
        options = ["--config", str(files.config), "--output_dir", str(self.sweep.folder), "--run_name", files.name]
        tags = {**self._tags, "trial": str(self.number)}
        options += ["--ckpt_path", "last", f"--tracking.tags={json.dumps(tags)}"]
        self._process = FitProcess([*self._fit, *options], files.run, files.log, self._environment)
        return False

    def _report(self) -> None:
        """Pass on what the first seed's run has logged since, and stop it where the pruner says so."""
        for step, value in self._follower.new_values():
            if step in self._reported or math.isnan(value):
                continue  # a resumed run repeats some steps
            self._reported.add(step)
            self.trial.report(value, step)
            if self.trial.should_prune():
                self._pruning = True
                self.ask_to_stop()
                return

    def _tell_complete(self) -> bool:
        per_seed = {files.seed: final_values(files.run) for files in self._done}
        means = []
        for metric in self.sweep.objectives:
            values = {seed: found[metric] for seed, found in per_seed.items() if metric in found}
            if len(values) < len(per_seed):
                return self._tell_failed(f"objective {metric!r} was not logged", self._done[0])
            means.append(statistics.fmean(values.values()))
            if len(values) > 1:
                self.trial.set_user_attr(f"{metric} by seed", values)
                self.trial.set_user_attr(f"{metric} standard deviation", statistics.stdev(values.values()))
        self.trial.study.tell(self.number, means)
        scores = ", ".join(f"{metric} {value:.5g}" for metric, value in zip(self.sweep.objectives, means, strict=True))
        self._say(f"trial {self.number}: {scores}")
        return True

    def _tell_pruned(self, why: str, files: TrialFiles) -> bool:
        from optuna.trial import TrialState

        self._mark(why, files)
        self.trial.study.tell(self.number, state=TrialState.PRUNED)
        return True

    def _tell_failed(self, why: str, files: TrialFiles) -> bool:
        from optuna.trial import TrialState

        self._mark(f"failed: {why}", files)
        self.trial.study.tell(self.number, state=TrialState.FAIL)
        return True

    def _mark(self, why: str, files: TrialFiles) -> None:
        self.trial.set_user_attr("end", why)
        self.trial.set_user_attr("log", str(files.log))
        self._say(f"trial {self.number}: {why} (log: {files.log})")
        if (files.run / JOURNAL_FILE).exists():
            journal = LineFile(files.run / JOURNAL_FILE)
            journal.append({"event": "tags", "time": files.log.stat().st_mtime, "tags": {"trial_end": why}})
            journal.close()
