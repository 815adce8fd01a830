"""The results of a sweep: tables, figures, and configurations for ``fit --config``."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moe.atomic import write_atomically
from lightning_moe.config.compose import walk
from lightning_moe.report.figures import png
from lightning_moe.report.tables import csv_table
from lightning_moe.sweep.space import Choice
from lightning_moe.sweep.spec import Sweep
from lightning_moe.sweep.trial import TrialRun

if TYPE_CHECKING:
    from optuna import Study
    from optuna.importance import BaseImportanceEvaluator
    from optuna.trial import FrozenTrial

BEST_CONFIG = "best_config.yaml"
TRIALS_TABLE = "trials.csv"
SEED = 1  # of the random forest that finds the importances


def parameters(sweep: Sweep) -> dict[str, str]:
    """Return the sweep as parameters of its MLflow run."""
    found = {f"space.{p.key}": json.dumps(sweep.identity()["space"][p.key]) for p in sweep.space.parameters}
    found |= {f"objectives.{metric}": direction for metric, direction in sweep.objectives.items()}
    found |= {"sampler": json.dumps(sweep.sampler), "pruner": json.dumps(sweep.pruner)}
    budget = {"trials": sweep.trials, "hours": sweep.hours, "tokens_per_trial": sweep.tokens_per_trial}
    return found | {f"budget.{key}": json.dumps(value) for key, value in budget.items()} | {"seeds": str(sweep.seeds)}


def complete_trials(optuna_study: Study) -> list[FrozenTrial]:
    """Return the trials that have a value."""
    return [trial for trial in optuna_study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]


def best_trials(sweep: Sweep, optuna_study: Study) -> list[FrozenTrial]:
    """Return the best trial, or the Pareto front of several objectives in the order of the first one."""
    if len(sweep.objectives) == 1:
        return [optuna_study.best_trial] if complete_trials(optuna_study) else []
    return sorted(optuna_study.best_trials, key=lambda trial: trial.values)


def best_by_choice(sweep: Sweep, optuna_study: Study) -> Iterator[tuple[str, str, FrozenTrial]]:
    """Yield (parameter, choice, its best trial) for every named choice, such as each routing rule."""
    if len(sweep.objectives) > 1:
        return
    sign = 1 if next(iter(sweep.objectives.values())) == "minimize" else -1
    for parameter in sweep.space.parameters:
        if not isinstance(parameter.domain, Choice) or parameter.domain.settings is None:
            continue
        for name in parameter.domain.values:
            mine = [trial for trial in complete_trials(optuna_study) if trial.params.get(parameter.key) == name]
            if mine:
                yield parameter.key, str(name), min(mine, key=lambda trial: sign * trial.values[0])


def write_reports(sweep: Sweep, optuna_study: Study) -> list[str]:
    """Write ``trials.csv``, the best configurations and the figures; return their paths within the sweep's folder."""
    folder = sweep.folder
    write_atomically(folder / TRIALS_TABLE, _table(sweep, optuna_study).encode())
    written = [TRIALS_TABLE]
    best = best_trials(sweep, optuna_study)
    if len(sweep.objectives) > 1:
        shutil.rmtree(folder / "pareto", ignore_errors=True)  # trials leave the front
        configs = {f"pareto/trial-{trial.number:04d}.yaml": trial for trial in best}
    else:
        configs = {f"best/{key}/{name}.yaml": trial for key, name, trial in best_by_choice(sweep, optuna_study)}
        configs |= dict(zip([BEST_CONFIG], best, strict=False))
    for path, trial in configs.items():
        _write_config(sweep, trial, folder / path)
        written.append(path)
    return written + list(_figures(sweep, optuna_study))


def _write_config(sweep: Sweep, trial: FrozenTrial, path: Path) -> None:
    run = TrialRun.of(sweep, trial.number, sweep.seeds[0])
    if run.has_own_config():
        write_atomically(path, run.config.read_bytes())
    else:  # another machine ran the trial
        from lightning_moe.sweep.configuration import write_trial_config

        write_trial_config(sweep, dict(trial.params), sweep.seeds[0], path)


def _table(sweep: Sweep, optuna_study: Study) -> str:
    keys = [parameter.key for parameter in sweep.space.parameters]
    spreads = [f"{metric} standard deviation" for metric in sweep.objectives]
    columns = ["trial", "state", *sweep.objectives, *spreads, *keys, "seconds_from_start_to_end", "end", "log"]
    rows = []
    for trial in optuna_study.get_trials(deepcopy=False):
        row: dict[str, Any] = {"trial": trial.number, "state": trial.state.name}
        if trial.state.name == "COMPLETE":
            row |= zip(sweep.objectives, trial.values, strict=True)
        row |= {name: trial.user_attrs.get(name) for name in (*spreads, "end", "log")}
        row |= {key: _plain(value) for key, value in trial.params.items() if key in keys}
        rows.append(row | {"seconds_from_start_to_end": trial.duration and trial.duration.total_seconds()})
    return csv_table(rows, columns)


def _plain(value: Any) -> str:
    """Return a parameter's value as text, names without quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def importance_evaluator() -> BaseImportanceEvaluator:
    """Return fANOVA: the share of the objective's variance that a parameter explains, by a random forest.

    Optuna's default compares the best tenth of the trials with the rest, which is one or two of a sweep's few trials.
    A parameter that not all trials have is left out.
    """
    from optuna.importance import FanovaImportanceEvaluator

    return FanovaImportanceEvaluator(seed=SEED)


def _figures(sweep: Sweep, optuna_study: Study) -> Iterator[str]:
    """Draw Optuna's own plots, without those that need more trials."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as plots

    names = list(sweep.objectives)
    wanted: dict[str, Callable[[], Any]] = {}
    for index, metric in enumerate(names):
        suffix = "" if len(names) == 1 else "_" + metric.replace("/", "_")
        options: dict[str, Any] = {"target_name": metric}
        if suffix:
            options["target"] = partial(_value, index)
        wanted["history" + suffix] = partial(plots.plot_optimization_history, optuna_study, **options)
        wanted["importance" + suffix] = partial(
            plots.plot_param_importances, optuna_study, evaluator=importance_evaluator(), **options
        )
    if len(names) in (2, 3):
        wanted["pareto_front"] = partial(plots.plot_pareto_front, optuna_study, target_names=names)
    if len(complete_trials(optuna_study)) < 2:
        return
    for name, draw in wanted.items():
        with warnings.catch_warnings(), plt.rc_context():
            warnings.simplefilter("ignore")
            try:
                draw()
            except (ValueError, RuntimeError):
                plt.close("all")
                continue
            image = png(plt.gcf())
            plt.close("all")
        path = f"figures/{name}.png"
        write_atomically(sweep.folder / path, image)
        yield path


def _value(index: int, trial: FrozenTrial) -> float:
    return float(trial.values[index])


def text(sweep: Sweep, optuna_study: Study) -> str:
    """Return the text that the command prints at the end."""
    states = [trial.state.name for trial in optuna_study.get_trials(deepcopy=False)]
    counts = ", ".join(f"{states.count(name)} {name.lower()}" for name in dict.fromkeys(states))
    lines = [f"Sweep {sweep.name}: {counts or 'no trial'}", ""]
    best = best_trials(sweep, optuna_study)
    if not best:
        return "\n".join(lines)
    lines.append("Best trial" if len(sweep.objectives) == 1 else "Pareto front")
    lines += [f"  {_describe(sweep, trial)}" for trial in best]
    chosen = list(best_by_choice(sweep, optuna_study))
    lines += ["", "Best of each choice"] if chosen else []
    lines += [f"  {key}={name}: {_describe(sweep, trial)}" for key, name, trial in chosen]
    where = BEST_CONFIG if len(sweep.objectives) == 1 else f"pareto/trial-{best[0].number:04d}.yaml"
    return "\n".join([*lines, "", f"Train it again: python -m lightning_moe fit --config {sweep.folder / where}"])


def _describe(sweep: Sweep, trial: FrozenTrial) -> str:
    scores = []
    for metric, value in zip(sweep.objectives, trial.values, strict=True):
        spread = trial.user_attrs.get(f"{metric} standard deviation")
        scores.append(f"{metric} {value:.5g}" + (f" ± {spread:.2g} (sd of {len(sweep.seeds)} seeds)" if spread else ""))
    short = {key: key.rpartition(".")[2] for key, _ in walk(trial.params)}
    values = ", ".join(
        f"{short[key]}={value:.5g}" if isinstance(value, float) else f"{short[key]}={value}"
        for key, value in trial.params.items()
    )
    return f"trial {trial.number}: {', '.join(scores)}  ({values})"
