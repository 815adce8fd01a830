"""``python -m lightning_moe sweep`` with real training: killed, continued, seen in MLflow; on two processes, pruned."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from helpers.tiny_experiment import write_tiny_experiment
from small_sweep import DECAY

from lightning_moe.tracking import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_MOE_CACHE", str(tmp_path / "cache"))
    for variable in ("LIGHTNING_MOE_RUN", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def write(folder: Path, **content: Any) -> None:
    config = write_tiny_experiment(folder, max_steps=40, val_check_interval=20) | {
        "checkpoint.every_n_train_steps": 5,
        "model.schedule.adamw_warmup_steps": 10,  # longer than the run of two steps before the first trial
    }
    base = {"config": [config, *content.pop("config", [])], "space": {DECAY: {"float": [0.5, 0.99]}}}
    (folder / "study.yaml").write_text(yaml.safe_dump(base | {"objectives": {"val/loss": "minimize"}} | content))


def start() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lightning_moe", "sweep", "study.yaml"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    return out


def trials() -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="study", storage="sqlite:///runs/study/study.db").get_trials()


def test_a_killed_sweep_continues_its_trial_from_the_checkpoint_and_mlflow_has_it_all(workplace: Path) -> None:
    write(workplace, budget={"trials": 2})
    process = start()
    last = workplace / "runs/study/trial-0001-s1/checkpoints/last.ckpt"
    deadline = time.monotonic() + 300
    while not last.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    reached = torch.load(last, weights_only=True)["global_step"]
    assert 5 <= reached < 40
    before = trials()[1]
    assert before.state.name == "RUNNING"

    out = finish(start())
    assert "trial 1: taken up again" in out
    after = trials()
    assert [trial.state.name for trial in after] == ["COMPLETE", "COMPLETE"]
    assert after[1].params == before.params
    log = (workplace / "runs/study/trial-0001-s1.log").read_text()
    assert "Restoring states from the checkpoint path" in log
    metrics = read_metrics(workplace / "runs/study/trial-0001-s1")
    assert after[1].value == [line["val/loss"] for line in metrics if "val/loss" in line][-1]
    steps = [line["step"] for line in metrics if "train/loss" in line]
    assert steps == sorted(set(steps))

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{workplace}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'lightning_moe'")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"study", "trial-0000-s1", "trial-0001-s1"}
    parent = runs.pop("study")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert [run.info.status for run in (parent, *runs.values())] == ["FINISHED"] * 3
    for trial in after:
        run = runs[f"trial-{trial.number:04d}-s1"]
        assert float(run.data.params[DECAY]) == trial.params[DECAY]
        assert run.data.metrics["val/loss"] == pytest.approx(trial.value)
        assert {run.data.tags["sweep"], run.data.tags["trial"]} == {"study", str(trial.number)}
    values = [metric.value for metric in client.get_metric_history(parent.info.run_id, "sweep/val/loss")]
    assert values == pytest.approx([trial.value for trial in after])
    assert parent.data.metrics["sweep/best/val/loss"] == pytest.approx(min(trial.value for trial in after))
    artifacts = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert {"sweep.yaml", "trials.csv", "best_config.yaml", "figures"} <= artifacts
    figures = {artifact.path for artifact in client.list_artifacts(parent.info.run_id, "figures")}
    assert figures == {"figures/history.png", "figures/parameters.png"}
    assert "python -m lightning_moe fit --config runs/study/best_config.yaml" in out
    from lightning_moe.config.compose import load_layers
    from lightning_moe.training.parse import parse

    best = parse(load_layers(workplace / "runs/study/best_config.yaml")).config
    assert best.model.routing.init_args.ema_decay == min(after, key=lambda trial: trial.value).params[DECAY]
    assert best.tracking.tags is None


def test_a_trial_on_two_processes_is_sampled_once_and_pruned(workplace: Path) -> None:
    two = ["trainer/ddp", {"trainer": {"accelerator": "cpu", "devices": 2, "max_steps": 3000}}]
    pruner = {"name": "ThresholdPruner", "upper": 0.0}
    write(workplace, budget={"trials": 1}, config=[*two, {"tracking.enabled": False}], pruner=pruner)
    out = finish(start())
    (trial,) = trials()
    assert trial.state.name == "PRUNED", out
    assert "trial 0: pruned at step 19" in out
    config = yaml.safe_load((workplace / "runs/study/trial-0000-s1/config.yaml").read_text())
    assert config["model"]["routing"]["init_args"]["ema_decay"] == trial.params[DECAY]
    assert config["trainer"]["devices"] == 2
    assert read_metrics(workplace / "runs/study/trial-0000-s1")[-1]["step"] < 2999
