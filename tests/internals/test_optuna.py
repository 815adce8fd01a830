"""Each of Optuna's private names still does what we use it for."""

import multiprocessing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from lightning_moe.internals.optuna import JournalKernelLock, ignore_stop, reopen_trial


def test_a_reopened_trial_keeps_what_it_has_and_can_be_reported_pruned_and_told(tmp_path: Path) -> None:
    where = {"study_name": "s", "storage": f"sqlite:///{tmp_path}/s.db"}
    began = optuna.create_study(**where).ask()
    x = began.suggest_float("x", 0, 1)
    began.report(0.5, 1)

    study = optuna.load_study(**where, pruner=optuna.pruners.ThresholdPruner(upper=1.0))
    trial = reopen_trial(study, study.get_trials()[0])
    assert trial.suggest_float("x", 0, 1) == x
    assert 0 <= trial.suggest_float("y", 0, 1) <= 1
    trial.report(2.0, 2)
    assert trial.should_prune()
    trial.set_user_attr("end", "over")
    study.tell(trial.number, 3.0)

    (told,) = optuna.load_study(**where).get_trials()
    assert (told.state, told.value, told.intermediate_values) == (TrialState.COMPLETE, 3.0, {1: 0.5, 2: 2.0})
    assert told.params.keys() == {"x", "y"}
    assert told.user_attrs == {"end": "over"}


def test_a_sampler_that_has_tried_everything_may_say_so() -> None:
    def try_everything(study: optuna.Study) -> None:
        for _ in range(2):
            trial = study.ask()
            study.tell(trial, trial.suggest_categorical("x", [1, 2]))

    with pytest.raises(RuntimeError, match=r"Study\.stop"):  # else `ignore_stop` is needed no more
        try_everything(optuna.create_study(sampler=optuna.samplers.BruteForceSampler()))
    study = optuna.create_study(sampler=optuna.samplers.BruteForceSampler())
    ignore_stop(study)
    try_everything(study)
    assert {trial.value for trial in study.get_trials()} == {1, 2}


def hold(path: str, ready: Any) -> None:
    JournalKernelLock(path).acquire()
    ready.set()
    multiprocessing.Event().wait()


def append(journal: str) -> None:
    backend = JournalFileBackend(journal, lock_obj=JournalKernelLock(f"{journal}.lock"))  # type: ignore[arg-type]
    optuna.create_study(storage=JournalStorage(backend), study_name="s")


def test_the_journal_waits_for_the_lock_and_goes_on_when_its_holder_is_killed(tmp_path: Path) -> None:
    journal, context = f"{tmp_path}/journal", multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(f"{journal}.lock", ready), daemon=True)
    holder.start()
    ready.wait()
    writer = context.Process(target=append, args=(journal,), daemon=True)
    writer.start()
    writer.join(2)
    assert writer.is_alive(), "it waits for the lock"
    holder.kill()
    writer.join(20)
    assert writer.exitcode == 0
