"""The runs of a study: their folders and configurations, and the loop that trains what is missing."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_moe.atomic import write_atomically
from lightning_moe.config.compose import Layer, merge
from lightning_moe.config.yaml_text import dump_yaml
from lightning_moe.errors import UserError
from lightning_moe.filenames import SUMMARY_FILE
from lightning_moe.study.spec import Method, Study, spelled
from lightning_moe.sweep.files import RunFiles
from lightning_moe.sweep.process import FitProcess, slot_environment, visible_gpus
from lightning_moe.sweep.results import is_finished, last_line
from lightning_moe.sweep.space import nest
from lightning_moe.sweep.trial import DIVERGED, FIT

POLL_SECONDS = 0.3


@dataclass(frozen=True)
class StudyRun(RunFiles):
    """One ``fit``; its name says method, tuned value and seed: another value is another run.

    Args:
        method: what is trained.
        value: of the tuned key.
        seed: of weights and order of the text.
    """

    method: Method
    value: float
    seed: int

    @property
    def diverged(self) -> Path:
        """Exists where the run ended by a loss that is not finite; it says at which step."""
        return self.folder / f"{self.name}.diverged"

    @property
    def is_over(self) -> bool:
        return is_finished(self.run) or self.diverged.exists()

    @property
    def loss(self) -> float | None:
        """Final validation loss, nats per token; infinite where the run diverged, null where it is not over."""
        if is_finished(self.run):
            return float(json.loads((self.run / SUMMARY_FILE).read_text())["loss"])
        return math.inf if self.diverged.exists() else None


def tuning_runs(study: Study) -> list[StudyRun]:
    """One run per tuned method and value."""
    folder, seed = study.folder / "tune", study.tuning.seed
    return [
        StudyRun(folder, f"{method.name}-{spelled(value)}", method, value, seed)
        for method in study.methods.values()
        if method.is_tuned
        for value in study.tuning.values
    ]


def tuning_losses(study: Study) -> dict[str, dict[float, float]]:
    """Tuned method → value → validation loss (infinite: diverged), of the runs that are over."""
    losses: dict[str, dict[float, float]] = {}
    for run in tuning_runs(study):
        if (loss := run.loss) is not None:
            losses.setdefault(run.method.name, {})[run.value] = loss
    return losses


def tuned_values(study: Study) -> dict[str, float]:
    """The value with the lowest loss of each tuned method whose runs are all over, and of which one is finite."""
    return {
        name: min(losses, key=lambda value: losses[value])
        for name, losses in tuning_losses(study).items()
        if len(losses) == len(study.tuning.values) and math.isfinite(min(losses.values()))
    }


def untrainable(study: Study) -> list[str]:
    """Methods that are not compared, because the one whose value they would take diverged at every value."""
    losses = tuning_losses(study)
    values = len(study.tuning.values)
    diverged = {name for name, found in losses.items() if [*found.values()] == [math.inf] * values}
    return [name for name, method in study.methods.items() if method.tuned_as in diverged]


def compared_runs(study: Study, tuned: Mapping[str, float]) -> list[StudyRun]:
    """One run per seed and method with a tuned value, all methods of a seed before those of the next."""
    return [
        StudyRun(study.folder / "compare", f"{method.name}-{spelled(value)}-s{seed}", method, value, seed)
        for seed in study.seeds
        for method in study.methods.values()
        if (value := tuned.get(method.tuned_as)) is not None
    ]


def layers(study: Study, run: StudyRun) -> list[Layer]:
    """A run's configuration, lowest first."""
    keys = {study.tuning.key: run.value, "seed_everything": run.seed, "tracking.experiment_name": study.name}
    return [*study.base, *run.method.layers, Layer(study.path, nest(keys))]


def configuration(study: Study, run: StudyRun) -> str:
    """A run's configuration as YAML, which ``fit --config`` takes as it is.

    Raises:
        UserError: there is a run of this name that was made from another configuration.
    """
    text = dump_yaml(merge(layers(study, run)), allow_unicode=False)
    started = run.run.exists() or run.diverged.exists()
    if started and run.config.exists() and run.config.read_text() != text:
        raise UserError(
            f"{run.run}: was trained with another configuration ({run.config}) than {study.path} means now: give the "
            "study another name, or move the folder away"
        )
    return text


class StudyLoop:
    """Trains runs, several at a time, until all are over.

    Args:
        study: the study.
        workers: runs at the same time.
        say: tells the user a line.
        fit: the command that trains, before its options.
    """

    def __init__(
        self, study: Study, workers: int = 1, say: Callable[[str], None] = print, fit: Sequence[str] = FIT
    ) -> None:
        self._study, self._workers, self._say, self._fit = study, workers, say, fit
        self._gpus = visible_gpus()

    def run(self, stage: str, runs: Sequence[StudyRun]) -> list[str]:
        """Train those that are not over.

        Args:
            stage: ``tune`` or ``compare``, a tag of the MLflow runs.
            runs: in the order in which they begin.

        Returns:
            A line for each run that failed; the others were trained all the same.

        Raises:
            UserError: a run of a name was made from another configuration.
            KeyboardInterrupt: what ran was stopped and goes on from its last checkpoint at the next start.
        """
        configurations = {run.name: configuration(self._study, run) for run in runs}
        waiting = [run for run in runs if not run.is_over]
        self._say(f"{stage}: {len(runs) - len(waiting)} of {len(runs)} runs are there")
        total, done, began, failures = len(waiting), 0, time.monotonic(), []
        slots: list[tuple[StudyRun, FitProcess] | None] = [None] * min(self._workers, max(1, total))
        try:
            while waiting or any(slots):
                for index, slot in enumerate(slots):
                    if slot is None and waiting:
                        slots[index] = self._start(stage, waiting[0], index, configurations[waiting.pop(0).name])
                    elif slot is not None and (code := slot[1].exit_code()) is not None:
                        slots[index] = None
                        done += 1
                        left = (time.monotonic() - began) / done * (total - done) / 60
                        failure = self._ended(slot[0], code, f"{done} of {total}, about {left:.0f} min left")
                        failures += [failure] if failure else []
                time.sleep(POLL_SECONDS)
        finally:
            running = [process for _, process in filter(None, slots)]
            for process in running:
                process.ask_to_stop()
            for process in running:
                process.wait_or_kill()
        return failures

    def _start(self, stage: str, run: StudyRun, slot: int, content: str) -> tuple[StudyRun, FitProcess]:
        write_atomically(run.config, content.encode())
        tags = {"study": self._study.name, "stage": stage, "method": run.method.name}
        options = ["--config", str(run.config), "--output_dir", str(run.folder), "--run_name", run.name]
        options += ["--ckpt_path", "last", f"--tracking.tags={json.dumps(tags)}"]
        environment = slot_environment(slot, self._workers, self._gpus)
        return run, FitProcess([*self._fit, *options], run.run, run.log, environment)

    def _ended(self, run: StudyRun, code: int, progress: str) -> str | None:
        if code == 0 and is_finished(run.run):
            self._say(f"{run.name}: val/loss {run.loss:.4f}  ({progress})")
            return None
        reason = last_line(run.log)
        if code == DIVERGED:
            write_atomically(run.diverged, f"{reason}\n".encode())
            self._say(f"{run.name}: diverged  ({progress})")
            return None
        failure = f"{run.name}: exit code {code}: {reason} (log: {shlex.quote(str(run.log))})"
        self._say(f"failed: {failure}  ({progress})")
        return failure
