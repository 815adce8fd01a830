"""Which Optuna study a sweep opens, which it refuses, and how its processes share it."""

import multiprocessing
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from small_sweep import DECAY, Make

from lightning_moe.errors import UserError
from lightning_moe.sweep.locks import FileLocks
from lightning_moe.sweep.optuna_study import build_sampler, open_optuna_study
from lightning_moe.sweep.pool import slot_environment
from lightning_moe.sweep.trials import importance_evaluator


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": {"name": "TPESampeler"}}, "sampler: name='TPESampeler': did you mean 'TPESampler'"),
        (
            {"sampler": {"name": "TPESampler", "sed": 1}},
            "sampler: TPESampler has no argument 'sed': did you mean 'seed'",
        ),
        ({"sampler": {"name": "GridSampler"}}, "take BruteForceSampler"),
        ({"sampler": {"name": "BruteForceSampler"}}, "needs choices, int, or float with step"),
        ({"sampler": {"name": "BaseSampler"}}, "name='BaseSampler'"),
        ({"sampler": "TPESampler"}, "sampler='TPESampler': must be {name: …"),
        ({"pruner": {"name": "MedianPruner", "n_startup_trials": -1}}, "pruner: MedianPruner: "),
        ({"pruner": {"name": "PatientPruner", "wrapped_pruner": {"name": "Median"}, "patience": 1}}, "wrapped_pruner"),
        ({"storage": "mysql://x"}, "storage='mysql://x': must begin with one of sqlite:///"),
        (
            {"storage": "sqlite:////proc/nothing/here.db"},
            "sqlite:////proc/nothing/here.db': cannot be reached",
        ),
        ({"storage": "journal:////proc/nothing/here"}, "storage='journal:////proc/nothing/here': cannot be reached"),
    ],
)
def test_a_study_that_cannot_be_opened_is_refused_by_key(changes: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(UserError, match=message):
        open_optuna_study(make(**changes))


def test_a_database_with_mlflows_tables_is_refused(make: Make, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    url = f"sqlite:///{tmp_path}/mlflow.db"
    MlflowClient(url).search_experiments()
    with pytest.raises(UserError, match=r"mlflow\.db': holds the tables of another program, such as MLflow"):
        open_optuna_study(make(storage=url))


def test_a_server_that_does_not_answer_is_refused_without_its_password(make: Make) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(UserError, match="cannot be reached") as caught:
            open_optuna_study(make(storage=f"postgresql://me:secret@127.0.0.1:{port}/db"))
    assert f"me:***@127.0.0.1:{port}" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {DECAY: {"float": [0.5, 0.9]}}}, f"another space: {DECAY}.high: 0.99 there, 0.9 here"),
        ({"space": {"trainer.max_steps": {"int": [1, 9]}}}, "another space: "),
        ({"objectives": {"val/loss": "maximize"}}, 'another objectives: val/loss: "minimize" there, "maximize" here'),
        ({"seeds": [1, 2]}, r"another seeds: \[1\] there, \[1, 2\] here"),
        (
            {"config": [{"tracking.enabled": False, "trainer.max_steps": 4}]},
            "config: trainer.max_steps: 3 there",
        ),
        ({"budget": {"trials": 3, "tokens_per_trial": 9999}}, "another budget: tokens_per_trial: null there, 9999"),
    ],
)
def test_a_study_of_another_sweep_is_refused(changes: dict[str, Any], message: str, make: Make) -> None:
    first = make()
    open_optuna_study(first).optuna_study.ask()
    with pytest.raises(UserError, match=message):
        open_optuna_study(make(**changes))


def test_a_study_without_a_trial_becomes_that_of_the_changed_sweep(make: Make) -> None:
    open_optuna_study(make())
    changed = open_optuna_study(make(objectives={"val/loss": "maximize", "summary/loss": "minimize"})).optuna_study
    assert [direction.name for direction in changed.directions] == ["MAXIMIZE", "MINIMIZE"]


def test_a_study_goes_on_with_more_trials_and_another_sampler(make: Make) -> None:
    space = {"a": {"choices": {"x": {}, "y": {DECAY: 0.5}}}, "b": {"int": [1, 2], "when": {"a": "x"}}}
    open_optuna_study(make(space=space)).optuna_study.ask()
    changes = {"budget": {"trials": 30}, "sampler": {"name": "TPESampler"}, "pruner": {"name": "MedianPruner"}}
    again = open_optuna_study(make(space=space, **changes)).optuna_study
    assert len(again.get_trials()) == 1
    assert isinstance(again.sampler, optuna.samplers.TPESampler)


def test_a_study_made_by_other_means_is_refused(make: Make) -> None:
    sweep = make()
    sweep.folder.mkdir(parents=True)
    study = optuna.create_study(storage=f"sqlite:///{sweep.folder}/study.db", study_name=sweep.name)
    study.enqueue_trial({"x": 1})
    with pytest.raises(UserError, match="is not of this command"):
        open_optuna_study(sweep)


def test_each_trial_has_its_own_seed_and_a_sequence_one_for_all(make: Make) -> None:
    sweep = make()
    draws = []
    for number in (0, 1, 1):
        study = optuna.create_study(sampler=build_sampler(sweep, number))
        draws.append(study.ask().suggest_float("x", 0, 1))
    assert draws[0] != draws[1] == draws[2]
    sequence = make(sampler={"name": "QMCSampler", "seed": 3})
    assert [build_sampler(sequence, number)._seed for number in (0, 1)] == [3, 3]


def _hold(path: Path, ready: Any, done: Any) -> None:
    assert FileLocks(path).try_lock(5)
    ready.set()
    done.wait()


def test_a_lock_is_exclusive_and_dies_with_its_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "locks", ready, done))
    holder.start()
    ready.wait()
    locks = FileLocks(tmp_path / "locks")
    assert not locks.try_lock(5)
    assert locks.holder(5) == f"process {holder.pid}"
    assert locks.try_lock(6)
    holder.kill()
    holder.join()
    assert holder.exitcode == -signal.SIGKILL
    assert locks.try_lock(5)


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    dealt = [slot_environment(slot, 2, list("0123"))["CUDA_VISIBLE_DEVICES"] for slot in range(2)]
    assert dealt == ["0,1", "2,3"]
    assert [slot_environment(s, 3, ["a", "b"])["CUDA_VISIBLE_DEVICES"] for s in range(3)] == ["a", "b", "a"]
    assert slot_environment(0, 1, ["0", "1"]) == slot_environment(0, 2, []) == {}


def test_few_trials_suffice_to_tell_which_parameter_matters() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    # the cost follows from the first alone
    study.optimize(lambda trial: trial.suggest_float("rate", 0.25, 4) + 0 * trial.suggest_float("lr", 0, 1), 8)
    found = optuna.importance.get_param_importances(study, evaluator=importance_evaluator())
    assert found["rate"] > 0.8


@pytest.mark.parametrize(("sampler", "library"), [("CmaEsSampler", "cmaes"), ("QMCSampler", "scipy")])
def test_a_sampler_without_its_library_says_what_to_install(make: Make, sampler: str, library: str) -> None:
    """In a process of its own, because Optuna looks for the libraries once."""
    sweep = make(sampler={"name": sampler, "seed": 1})
    code = (
        "import sys, pathlib\n"
        f"sys.modules[{library!r}] = None\n"
        "from lightning_moe.sweep.optuna_study import build_sampler\n"
        "from lightning_moe.sweep.spec import read_sweep\n"
        "build_sampler(read_sweep(pathlib.Path(sys.argv[1])), 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(sweep.path)], capture_output=True, text=True)
    assert f"{sampler} needs another library: pip install {library}" in done.stderr.splitlines()[-1]
