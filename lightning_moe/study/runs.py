"""The runs of a study: their folders and configurations, and the training of those that are missing."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_moe.atomic import write_atomically
from lightning_moe.config.compose import Layer, merge
from lightning_moe.config.yaml_text import dump_yaml
from lightning_moe.errors import UserError
from lightning_moe.file_schema import read_text
from lightning_moe.filenames import SUMMARY_FILE
from lightning_moe.redaction import redact_all
from lightning_moe.runs.summary import read_summary
from lightning_moe.study.spec import Method, Study, spelled
from lightning_moe.sweep.configuration import run_environment
from lightning_moe.sweep.pool import Pool, PoolRun, say
from lightning_moe.sweep.space import nest


@dataclass(frozen=True)
class StudyRun(PoolRun):
    """One ``fit``, whose name says method, tuned value and seed: another value is another run.

    Args:
        method: method to train.
        value: value of the tuned key.
        seed: random seed for the weights and the order of the text.
    """

    method: Method
    value: float
    seed: int

    @property
    def diverged(self) -> Path:
        """File that exists if the run ended by a loss that is not finite; it says at which step."""
        return self.output_dir / f"{self.name}.diverged"

    @property
    def is_over(self) -> bool:
        return self.is_finished or self.diverged.exists()

    @property
    def loss(self) -> float | None:
        """Final validation loss in nats per token; infinite if the run diverged, `None` if it is not over."""
        if self.is_finished:
            return _loss(self.folder)
        return math.inf if self.diverged.exists() else None


def _loss(folder: Path) -> float:
    loss = read_summary(folder).get("loss")
    if loss is None:  # a run that is finished without a validation loss cannot have been trained by a study
        raise UserError(f"{folder / SUMMARY_FILE}: loss=null: must be a number; move the folder away to train it again")
    return float(loss)


def tuning_runs(study: Study) -> list[StudyRun]:
    """List one run per tuned method and value."""
    folder, seed = study.folder / "tune", study.tuning.seed
    return [
        StudyRun(folder, f"{method.name}-{spelled(value)}", method, value, seed)
        for method in study.methods.values()
        if method.is_tuned
        for value in study.tuning.values
    ]


def tuning_losses(study: Study) -> dict[str, dict[float, float]]:
    """Return tuned method → value → validation loss of the runs that are over; it is infinite if a run diverged."""
    losses: dict[str, dict[float, float]] = {}
    for run in tuning_runs(study):
        if (loss := run.loss) is not None:
            losses.setdefault(run.method.name, {})[run.value] = loss
    return losses


def tuned_values(study: Study) -> dict[str, float]:
    """Return the best value of each tuned method whose runs are all over, if one of their losses is finite."""
    return {
        name: min(losses, key=lambda value: losses[value])
        for name, losses in tuning_losses(study).items()
        if len(losses) == len(study.tuning.values) and math.isfinite(min(losses.values()))
    }


def untrainable(study: Study) -> list[str]:
    """List the methods that are not compared, because the method whose value they would take always diverged."""
    losses = tuning_losses(study)
    values = len(study.tuning.values)
    diverged = {name for name, found in losses.items() if [*found.values()] == [math.inf] * values}
    return [name for name, method in study.methods.items() if method.tuned_as in diverged]


def compared_runs(study: Study, tuned: Mapping[str, float]) -> list[StudyRun]:
    """List one run per seed and method with a tuned value, all methods of a seed before those of the next."""
    return [
        StudyRun(study.folder / "compare", f"{method.name}-{spelled(value)}-s{seed}", method, value, seed)
        for seed in study.seeds
        for method in study.methods.values()
        if (value := tuned.get(method.tuned_as)) is not None
    ]


def layers(study: Study, run: StudyRun) -> list[Layer]:
    """Return the layers of a run's configuration, lowest first."""
    keys = {study.tuning.key: run.value, "seed_everything": run.seed, "tracking.experiment_name": study.name}
    return [*study.base, *run.method.layers, Layer(study.path, nest(keys))]


def configuration(study: Study, run: StudyRun) -> str:
    """Return a run's configuration as YAML, for ``fit --config``.

    Raises:
        UserError: a run of this name exists that was made from another configuration.
    """
    text = dump_yaml(redact_all(merge(layers(study, run))), allow_unicode=False)
    started = run.folder.exists() or run.diverged.exists()
    if started and run.config.exists() and read_text(run.config) != text:
        raise UserError(
            f"{run.folder}: was trained with another configuration ({run.config}) than {study.path} means now: give "
            "the study another name, or move the folder away"
        )
    return text


def train(study: Study, stage: str, runs: Sequence[StudyRun], workers: int) -> list[str]:
    """Train the runs that are not over, several at a time.

    Args:
        study: study of the runs.
        stage: stage ``tune`` or ``compare``, a tag of the MLflow runs.
        runs: runs in the order in which they begin.
        workers: number of runs at the same time.

    Returns:
        A line for each run that failed; the others were trained all the same.

    Raises:
        UserError: a run of a name was made from another configuration.
        KeyboardInterrupt: the runs were stopped; they continue from their last checkpoints at the next start.
    """
    configurations = {run.name: configuration(study, run) for run in runs}
    waiting = [run for run in runs if not run.is_over]
    say(f"{stage}: {len(runs) - len(waiting)} of {len(runs)} runs are there")
    total, done, began = len(waiting), 0, time.monotonic()
    failures: dict[str, str] = {}
    with Pool[StudyRun](workers, run_environment(study.base)) as pool:
        while waiting or not pool.is_empty:
            while waiting and pool.has_room:
                run = waiting.pop(0)
                write_atomically(run.config, configurations[run.name].encode())
                pool.start(run, {"study": study.name, "stage": stage, "method": run.method.name})
            for run, outcome in pool.wait():
                done += 1
                left = (time.monotonic() - began) / done * (total - done) / 60
                progress = f"({done} of {total}, about {left:.0f} min left)"
                if outcome.kind == "finished":
                    say(f"{run.name}: val/loss {run.loss:.4f}  {progress}")
                elif outcome.kind == "diverged":
                    write_atomically(run.diverged, f"{outcome.reason}\n".encode())
                    say(f"{run.name}: diverged  {progress}")
                else:
                    failures[run.name] = f"{run.name}: {outcome.reason} (log: {shlex.quote(str(run.log))})"
                    say(f"failed: {failures[run.name]}  {progress}")
    return [failures[run.name] for run in runs if run.name in failures]
