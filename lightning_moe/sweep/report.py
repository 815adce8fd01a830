"""The results of a sweep: tables, figures, and configurations for ``fit --config``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moe.atomic import write_atomically
from lightning_moe.config.compose import walk
from lightning_moe.report.tables import csv_table, markdown_table, shown
from lightning_moe.sweep.figures import figures
from lightning_moe.sweep.spec import Sweep
from lightning_moe.sweep.trial import TrialRun
from lightning_moe.sweep.trials import best_by_choice, best_trials, complete_trials
from lightning_moe.tracking.files import LONGEST_TAG

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

BEST_CONFIG = "best_config.yaml"
TRIALS_TABLE = "trials.csv"
MOST_DESCRIBED = 20  # trials of the description


def parameters(sweep: Sweep) -> dict[str, str]:
    """Return the sweep as parameters of its MLflow run."""
    found = {f"space.{p.key}": json.dumps(sweep.identity()["space"][p.key]) for p in sweep.space.parameters}
    found |= {f"objectives.{metric}": direction for metric, direction in sweep.objectives.items()}
    found |= {"sampler": json.dumps(sweep.sampler), "pruner": json.dumps(sweep.pruner)}
    budget = {"trials": sweep.trials, "hours": sweep.hours, "tokens_per_trial": sweep.tokens_per_trial}
    return found | {f"budget.{key}": json.dumps(value) for key, value in budget.items()} | {"seeds": str(sweep.seeds)}


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
    for name, image in figures(sweep, optuna_study):
        path = f"figures/{name}.png"
        write_atomically(folder / path, image)
        written.append(path)
    return written


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


def description(sweep: Sweep, optuna_study: Study) -> str:
    """Return the counts and the best trials as Markdown: the description of the sweep's run in MLflow.

    It has at most ``MOST_DESCRIBED`` trials, and fewer if MLflow would cut the text. The table comes first, because
    MLflow's page shows the first lines only.
    """
    first, direction = next(iter(sweep.objectives.items()))
    sign = 1 if direction == "minimize" else -1
    front = {trial.number for trial in best_trials(sweep, optuna_study)}
    trials = sorted(complete_trials(optuna_study), key=lambda t: (t.number not in front, sign * t.values[0], t.number))
    head = f"Sweep {sweep.name}: {_counts(optuna_study)}."
    if not trials:
        return head
    order = f"{'lowest' if sign == 1 else 'highest'} {first} first"
    order = f"the {len(front)} of the Pareto front first" if len(sweep.objectives) > 1 else order
    spread = f" ±: standard deviation of {len(sweep.seeds)} seeds." if len(sweep.seeds) > 1 else ""
    table = _best_table(sweep, trials[:MOST_DESCRIBED])
    while True:
        count = len(table) - 1
        what = "All complete trials" if count == len(trials) else f"The best {count} of {len(trials)} complete trials"
        text = f"{markdown_table(table)}\n\n{what}, {order}.{spread} {head}\n"
        if len(text) <= LONGEST_TAG or count == 1:
            return text
        table.pop()


def _best_table(sweep: Sweep, trials: Sequence[FrozenTrial]) -> list[list[str]]:
    keys = [parameter.key for parameter in sweep.space.parameters]
    short = [key.rpartition(".")[2] for key in keys]
    names = [name if short.count(name) == 1 else key for key, name in zip(keys, short, strict=True)]
    table = [["trial", *sweep.objectives, *names]]
    for trial in trials:
        values = [shown(trial.params[key]) if key in trial.params else "" for key in keys]
        table.append([str(trial.number), *_scores(sweep, trial), *(value.replace("|", r"\|") for value in values)])
    return table


def _counts(optuna_study: Study) -> str:
    states = [trial.state.name for trial in optuna_study.get_trials(deepcopy=False)]
    return ", ".join(f"{states.count(name)} {name.lower()}" for name in dict.fromkeys(states)) or "no trial"


def _scores(sweep: Sweep, trial: FrozenTrial) -> list[str]:
    """Return a complete trial's values, with their spread over seeds if there are several."""
    scores = []
    for metric, value in zip(sweep.objectives, trial.values, strict=True):
        spread = trial.user_attrs.get(f"{metric} standard deviation")
        scores.append(f"{value:.5g}" + (f" ± {spread:.2g}" if spread else ""))
    return scores


def text(sweep: Sweep, optuna_study: Study) -> str:
    """Return the text that the command prints at the end."""
    lines = [f"Sweep {sweep.name}: {_counts(optuna_study)}", ""]
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
