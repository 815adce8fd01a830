"""The trials of a sweep: which have ended, which are the best, and which parameters matter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lightning_moe.sweep.space import Choice
from lightning_moe.sweep.spec import Sweep

if TYPE_CHECKING:
    from optuna import Study
    from optuna.importance import BaseImportanceEvaluator
    from optuna.trial import FrozenTrial

SEED = 1  # of the random forest that finds the importances
FEWEST = 4  # complete trials below which importances would be a guess


def complete_trials(optuna_study: Study) -> list[FrozenTrial]:
    """Return the trials that have a value."""
    return [trial for trial in optuna_study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]


def ended_trials(optuna_study: Study) -> list[FrozenTrial]:
    """Return the trials that are complete, pruned or failed, in the order of their ends."""
    trials = [trial for trial in optuna_study.get_trials(deepcopy=False) if trial.state.is_finished()]
    return sorted(trials, key=lambda trial: (trial.datetime_complete is None, trial.datetime_complete))


def best_value(values: Sequence[float], direction: str) -> float:
    """Return the best of some values of an objective; ``direction`` is ``minimize`` or ``maximize``."""
    return (min if direction == "minimize" else max)(values)


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


def importance_evaluator() -> BaseImportanceEvaluator:
    """Return fANOVA: the share of the objective's variance that a parameter explains, by a random forest.

    Optuna's default compares the best tenth of the trials with the rest, which is one or two of a sweep's few trials.
    A parameter that not all trials have is left out.
    """
    from optuna.importance import FanovaImportanceEvaluator

    return FanovaImportanceEvaluator(seed=SEED)


def importances(optuna_study: Study, objective: int) -> dict[str, float]:
    """Return the share of each parameter that all complete trials have, the largest first.

    Args:
        optuna_study: Optuna study.
        objective: position of the objective.

    Returns:
        Parameter → share of the variance. It is empty for fewer than ``FEWEST`` trials, and if all have the same value.
    """
    from optuna.importance import get_param_importances

    if len(complete_trials(optuna_study)) < FEWEST:
        return {}
    try:
        return get_param_importances(
            optuna_study, evaluator=importance_evaluator(), target=lambda trial: float(trial.values[objective])
        )
    except (ValueError, RuntimeError):
        return {}
