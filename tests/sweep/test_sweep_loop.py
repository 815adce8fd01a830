"""The loop of a sweep, with a stand-in for ``fit``: values, seeds, failures, pruning, and going on after kills."""

import csv
import itertools
import json
import math
import os
import signal
import statistics
import sys
import time
from contextlib import closing, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from small_sweep import DECAY, FORK, RATE, Make, start_process, wait_for

from lightning_moe.cli.main import main
from lightning_moe.errors import UserError
from lightning_moe.sweep.locks import LEADER
from lightning_moe.sweep.main import run_sweep
from lightning_moe.sweep.optuna_study import open_optuna_study
from lightning_moe.sweep.record import SweepRecord
from lightning_moe.sweep.spec import Sweep
from lightning_moe.sweep.trial import sampled_text
from lightning_moe.tracking import read_metrics


def sweep_to_end(sweep: Sweep, **options: Any) -> str:
    """Run the sweep and return what it printed."""
    with redirect_stdout(StringIO()) as said:
        run_sweep(sweep, **options)
    return said.getvalue()


def trials(sweep: Sweep) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=sweep.name, storage=f"sqlite:///{sweep.folder}/study.db").get_trials()


def loss(decay: float, seed: int = 1, steps: int = 3) -> float:
    return (decay - 0.9) ** 2 + seed / 1000 + 1 / steps


def count(sweep: Sweep, number: int, name: str, seed: int = 1) -> list[str]:
    path = sweep.folder / f"trial-{number:04d}-s{seed}" / name
    return path.read_text().split() if path.exists() else []


@pytest.mark.slow
def test_every_trial_is_one_run_of_its_own_configuration(make: Make) -> None:
    sweep = make()
    said = sweep_to_end(sweep)
    found = trials(sweep)
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 3
    for trial in found:
        config = yaml.safe_load((sweep.folder / f"trial-{trial.number:04d}-s1.yaml").read_text())
        assert config["model"]["routing"]["init_args"]["ema_decay"] == trial.params[DECAY]
        assert config["trainer"]["max_steps"] == 3
        assert config["run_name"] is None
        assert trial.value == pytest.approx(loss(trial.params[DECAY]))
    assert len({trial.params[DECAY] for trial in found}) == 3
    best = min(found, key=lambda trial: trial.value)
    best_config = sweep.folder / "best_config.yaml"
    assert best_config.read_text() == (sweep.folder / f"trial-{best.number:04d}-s1.yaml").read_text()
    assert f"trial {best.number}: val/loss {best.value:.5g}" in said
    command = f"python -m lightning_moe fit --config {sweep.folder}/trial-0000-s1.yaml"
    assert any(line.startswith("trial 0, seed 1: ") and line.endswith(command) for line in said.splitlines())
    with (sweep.folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val/loss"]) for row in rows] == [trial.value for trial in found]
    assert [json.loads(row[DECAY]) for row in rows] == [trial.params[DECAY] for trial in found]
    assert {path.name for path in (sweep.folder / "figures").iterdir()} == {
        "history.png",
        "parameters.png",
    }


def test_a_value_is_the_mean_over_seeds_with_its_spread(make: Make) -> None:
    sweep = make(seeds=[1, 5, 9], budget={"trials": 1})
    sweep_to_end(sweep)
    (trial,) = trials(sweep)
    values = [loss(trial.params[DECAY], seed) for seed in (1, 5, 9)]
    assert trial.value == pytest.approx(statistics.fmean(values))
    assert trial.user_attrs["val/loss standard deviation"] == pytest.approx(statistics.stdev(values))
    assert trial.user_attrs["val/loss by seed"] == pytest.approx(dict(zip("159", values, strict=True)))
    seeds = [
        yaml.safe_load((sweep.folder / f"trial-0000-s{seed}.yaml").read_text())["data"]["seed"] for seed in (1, 5, 9)
    ]
    assert seeds == [1, 5, 9]


@pytest.mark.slow
def test_a_crash_fails_its_trial_only_and_a_divergence_counts_as_bad(make: Make) -> None:
    space = {RATE: {"choices": [0.1, 0.9, 2.0]}}
    sweep = make(space=space, sampler={"name": "BruteForceSampler", "seed": 1}, budget={"trials": 10})
    said = sweep_to_end(sweep)
    states = {trial.params[RATE]: trial for trial in trials(sweep)}
    assert {rate: trial.state.name for rate, trial in states.items()} == {0.1: "COMPLETE", 0.9: "PRUNED", 2.0: "FAIL"}
    assert states[2.0].user_attrs["end"] == "failed: exit code 1: RuntimeError: out of memory"
    assert "not finite at step 1" in states[0.9].user_attrs["end"]
    assert "out of memory" in Path(states[2.0].user_attrs["log"]).read_text()
    assert f"log: {states[2.0].user_attrs['log']}" in said


@pytest.mark.slow
def test_several_objectives_give_a_front(make: Make) -> None:
    sweep = make(objectives={"val/loss": "minimize", "summary/flops_per_token": "minimize"}, budget={"trials": 6})
    sweep_to_end(sweep)
    found = trials(sweep)

    def dominated(trial: optuna.trial.FrozenTrial) -> bool:
        return any(o.values[0] < trial.values[0] and o.values[1] < trial.values[1] for o in found)

    front = {f"trial-{trial.number:04d}.yaml" for trial in found if not dominated(trial)}
    assert {path.name for path in (sweep.folder / "pareto").iterdir()} == front
    assert found[0].values[1] == pytest.approx(1000 * found[0].params[DECAY])
    assert (sweep.folder / "figures/pareto_front.png").is_file()


@pytest.mark.slow
def test_the_pruner_stops_a_run(make: Make) -> None:
    pruner = {"name": "ThresholdPruner", "upper": 0.4, "n_warmup_steps": 2}
    config = [{"tracking.enabled": False, "trainer.max_steps": 5000}]
    sweep = make(pruner=pruner, config=config, budget={"trials": 1}, space={DECAY: {"float": [0.0, 0.2]}})
    sweep_to_end(sweep)  # (0.9 − 0.2)² is above 0.4 already
    (trial,) = trials(sweep)
    assert trial.state.name == "PRUNED"
    assert max(trial.intermediate_values) >= 2
    for step, value in trial.intermediate_values.items():
        assert value == pytest.approx(loss(trial.params[DECAY], steps=step))
    assert int((sweep.folder / "trial-0000-s1/checkpoints/last.ckpt").read_text()) < 5000


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_sweep_goes_on_where_it_was(how: signal.Signals, make: Make) -> None:
    sweep = make(config=[{"tracking.enabled": False, "trainer.max_steps": 30}])
    process = start_process(sweep)
    last = sweep.folder / "trial-0001-s1/checkpoints/last.ckpt"
    wait_for(lambda: last.exists() and int(last.read_text()) >= 5)
    os.kill(process.pid, how)
    process.join()
    reached = int(last.read_text())
    before = trials(sweep)
    assert [trial.state.name for trial in before] == ["COMPLETE", "RUNNING"]
    time.sleep(0.2)
    assert int(last.read_text()) in (reached, reached + 1)  # its run died with it

    sweep_to_end(sweep)
    after = trials(sweep)
    assert [trial.state.name for trial in after] == ["COMPLETE"] * 3
    assert [trial.params for trial in after][:2] == [trial.params for trial in before]
    assert after[0].datetime_complete == before[0].datetime_complete
    assert [int(step) - reached in (0, 1) for step in count(sweep, 1, "starts")] == [False, True]
    assert [len(count(sweep, number, "ends")) for number in range(3)] == [1, 1, 1]
    assert after[1].value == pytest.approx(loss(after[1].params[DECAY], steps=30))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_command_says_so_in_one_line(
    make: Make, capfd: pytest.CaptureFixture[str], how: signal.Signals, code: int
) -> None:
    sweep = make(config=[{"tracking.enabled": False, "trainer.max_steps": 500}])
    process = FORK.Process(target=lambda: sys.exit(main(["sweep", "sweep.yaml"])))
    process.start()
    wait_for((sweep.folder / "trial-0000-s1/checkpoints/last.ckpt").exists)
    os.kill(process.pid, how)
    process.join(60)
    assert process.exitcode == code
    assert capfd.readouterr().err == "stopped: the same command continues from here\n"


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["RandomSampler", "TPESampler"])
def test_a_sweep_in_pieces_samples_what_a_whole_one_does(sampler: str, make: Make) -> None:
    content: dict[str, Any] = {"sampler": {"name": sampler, "seed": 7}}
    if sampler == "TPESampler":
        content["sampler"]["n_startup_trials"] = 2
    whole = make(name="whole", budget={"trials": 4}, **content)
    sweep_to_end(whole)
    for trials_so_far in (1, 4):
        pieces = make(name="pieces", budget={"trials": trials_so_far}, **content)
        sweep_to_end(pieces)
    sampled = [[trial.params for trial in trials(sweep)] for sweep in (whole, pieces)]
    assert sampled[0] == sampled[1]
    assert len({str(params) for params in sampled[0]}) == 4


@pytest.mark.slow
def test_workers_share_the_study(make: Make) -> None:
    sweep = make(budget={"trials": 6}, config=[{"tracking.enabled": False, "trainer.max_steps": 15}])
    other = start_process(sweep, workers=2)
    sweep_to_end(sweep, workers=2)
    other.join()
    found = trials(sweep)
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 6
    assert len({trial.params[DECAY] for trial in found}) == 6
    assert [count(sweep, number, "starts") for number in range(6)] == [["0"]] * 6
    spans = sorted((trial.datetime_start, trial.datetime_complete) for trial in found)
    assert any(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans))


def test_an_objective_that_no_run_logs_is_refused_before_the_first_trial(make: Make) -> None:
    sweep = make(objectives={"val/los": "minimize"})
    with pytest.raises(
        UserError, match="objectives: 'val/los' is not logged by a run of two steps: did you mean 'val/loss'"
    ):
        sweep_to_end(sweep)
    assert not sweep.folder.exists()


def test_a_base_that_does_not_run_is_refused_before_the_first_trial(make: Make) -> None:
    sweep = make(space={RATE: {"float": [2.0, 3.0]}})
    with pytest.raises(UserError, match=r"exit code 1: RuntimeError: out of memory \(log: .*probe\.log\)"):
        sweep_to_end(sweep)
    assert [path.name for path in sweep.folder.iterdir()] == ["probe.log"]


def test_what_was_refused_can_be_put_right_under_the_same_name(make: Make, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/studies.db"  # given, so it is opened before anything is tried
    with pytest.raises(UserError, match="'val/los' is not logged"):
        sweep_to_end(make(objectives={"val/los": "maximize"}, storage=storage))
    with pytest.raises(UserError, match="exit code 1"):
        sweep_to_end(make(space={RATE: {"float": [2.0, 3.0]}}, storage=storage))
    said = sweep_to_end(make(storage=storage, budget={"trials": 1}))
    assert "Sweep study: 1 complete" in said


def test_the_time_budget_ends_a_sweep(make: Make) -> None:
    sweep = make(budget={"trials": 1000, "hours": 1e-7})
    sweep_to_end(sweep)
    assert len(trials(sweep)) == 0
    assert not math.isinf(sweep.hours or math.inf)


@pytest.mark.slow
def test_the_sweep_is_one_mlflow_run_however_often_it_starts(make: Make, tmp_path: Path) -> None:
    config = [{"tracking.tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "trainer.max_steps": 3}]
    for trials_so_far in (1, 2):
        sweep = make(config=config, budget={"trials": trials_so_far})
        said = sweep_to_end(sweep)

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (parent,) = client.search_runs(["1"])
    assert parent.info.run_name == "study"
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["kind"] == "sweep"
    history = client.get_metric_history(parent.info.run_id, "sweep/val/loss")
    assert [(metric.step, metric.value) for metric in history] == [(t.number, t.value) for t in trials(sweep)]
    best = [metric.value for metric in client.get_metric_history(parent.info.run_id, "sweep/best/val/loss")]
    assert best == list(itertools.accumulate((metric.value for metric in history), min))
    note = parent.data.tags["mlflow.note.content"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in note.splitlines() if line[:1] == "|"]
    found = sorted(trials(sweep), key=lambda trial: trial.value)
    assert rows[0] == ["trial", "val/loss", "ema_decay"]
    assert rows[2:] == [[str(t.number), f"{t.value:.5g}", f"{t.params[DECAY]:.4g}"] for t in found]
    assert note.endswith("\n\nAll complete trials, lowest val/loss first. Sweep study: 2 complete.\n")
    for number in (0, 1):
        tags = json.loads((sweep.folder / f"trial-{number:04d}-s1/tags.json").read_text())
        assert tags.pop("sampled") == sampled_text(trials(sweep)[number].params)
        assert tags == {"sweep": "study", "trial": str(number), "mlflow.parentRunId": parent.info.run_id}
    assert f"/runs/{parent.info.run_id}" in said


@pytest.mark.slow
def test_without_mlflow_the_sweep_warns_and_goes_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PARENT_SECONDS", "FINALIZE_SECONDS"):
        monkeypatch.setattr(f"lightning_moe.sweep.record.{name}", 0.5)
    config = [{"tracking.tracking_uri": "http://127.0.0.1:1", "trainer.max_steps": 3}]
    sweep = make(config=config, budget={"trials": 1})
    said = sweep_to_end(sweep)
    assert "http://127.0.0.1:1 does not answer" in said
    assert [trial.state.name for trial in trials(sweep)] == ["COMPLETE"]
    tags = json.loads((sweep.folder / "trial-0000-s1/tags.json").read_text())
    assert tags.keys() == {"sweep", "trial", "sampled"}


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_best_so_far_never_gets_worse(make: Make, direction: str) -> None:
    """Trials end in another order than that of their numbers, and the record is continued."""
    from optuna.trial import TrialState

    sign = 1 if direction == "minimize" else -1
    sweep = make(config=[{"tracking.enabled": False}], objectives={"val/loss": direction})
    opened = open_optuna_study(sweep)
    with closing(opened.locks):
        asked = [opened.optuna_study.ask() for _ in range(5)]
        for ends in ([(2, 2.0), (0, 1.0), (1, 3.0)], [(4, None), (3, 1.5)]):
            record = SweepRecord(sweep, opened)
            record.open()
            for number, value in ends:
                state = TrialState.PRUNED if value is None else TrialState.COMPLETE
                opened.optuna_study.tell(asked[number].number, value and sign * value, state=state)
                record.update()
            record.finish(complete=True)
            opened.locks.unlock(LEADER)
    lines = read_metrics(sweep.folder)
    assert [(line["step"], line["sweep/trial"], sign * line["sweep/best/val/loss"]) for line in lines] == [
        (0, 2, 2.0), (1, 0, 1.0), (2, 1, 1.0), (3, 4, 1.0), (4, 3, 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize("objectives", [["val/loss"], ["val/loss", "val_routing/max_load"]])
def test_the_description_fits_into_mlflow_and_says_what_it_leaves_out(make: Make, objectives: list[str]) -> None:
    from lightning_moe.sweep.report import description
    from lightning_moe.tracking.files import LONGEST_TAG

    keys = [f"model.some.parameter_{number:02}_with_a_long_name" for number in range(20)]
    study = optuna.create_study(directions=["minimize"] * len(objectives))
    sweep = make(space={key: {"float": [0, 1]} for key in keys}, objectives=dict.fromkeys(objectives, "minimize"))
    assert description(sweep, study) == "Sweep study: no trial."
    for number in range(30):
        trial = study.ask({key: optuna.distributions.FloatDistribution(0, 1) for key in keys})
        study.tell(trial, [30 - number, float(number % 7)][: len(objectives)])
    note = description(sweep, study)
    assert len(note) <= LONGEST_TAG
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in note.splitlines() if line[:1] == "|"]
    assert f"The best {len(rows) - 2} of 30 complete trials" in note
    assert rows[0][-1] == "parameter_19_with_a_long_name"
    assert {len(row) for row in rows} == {1 + len(objectives) + 20}
    if len(objectives) == 1:
        assert [row[0] for row in rows[2:]] == [str(29 - place) for place in range(len(rows) - 2)]
    else:
        assert {int(row[0]) for row in rows[2:]} >= {28, 29}, "the front"


def test_a_trial_says_what_was_sampled() -> None:
    assert sampled_text({"model.optimizer.muon_lr": 0.0212345, "capacity": "free"}) == "muon_lr=0.02123, capacity=free"
