"""``python -m lightning_moe`` in processes of its own: with MLflow, on two processes, and from a wheel."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lightning_moe

pytestmark = pytest.mark.slow
REPOSITORY = Path(lightning_moe.__file__).parent.parent


def run(workplace: Path, *args: str, **environment: str) -> str:
    command = [sys.executable, "-m", "lightning_moe", *args]
    done = subprocess.run(
        command, cwd=workplace, env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_trains_and_mlflow_has_the_run(workplace: Path) -> None:
    out = run(workplace, "fit", "--config", "small", "--tracking.enabled=true")
    (folder,) = (workplace / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert re.fullmatch(r"expert_threshold-s1-\d{8}T\d{6}Z", folder.name)

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{workplace}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'lightning_moe'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == folder.name
    assert found.info.status == "FINISHED"
    assert found.data.metrics["val/loss"] == pytest.approx(summary["loss"])
    assert found.data.params["model.decoder.hidden_size"] == "32"
    assert {"routing": "expert_threshold", "seed": "1"}.items() <= found.data.tags.items()
    assert re.fullmatch("[0-9a-f]{16}", found.data.tags["data_fingerprint"])
    artifacts = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "summary.json", "figures"} <= artifacts
    assert re.search(r"open MLflow +python -m lightning_moe ui$", out, re.MULTILINE)
    assert f"/runs/{found.info.run_id}" in out

    # continuing the run continues its record
    run(workplace, "fit", "--ckpt_path=last", "--trainer.max_steps=5")
    (found,) = client.search_runs([experiment.experiment_id])
    assert len(client.get_metric_history(found.info.run_id, "train/loss")) == 5


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_one_run_and_equal_one_process(strategy: str, workplace: Path) -> None:
    small = ("fit", "--config", "small", "--model.routing=TokenChoice", "--trainer.max_steps=2")
    small += ("--trainer.limit_val_batches=1.0",)  # two batches of two processes would be other text
    out = run(workplace, *small, "--config", f"trainer/{strategy}", "--trainer.accelerator=cpu", "--trainer.devices=2")
    (folder,) = (workplace / "runs").iterdir()  # its name holds the time, and the processes start at different times
    assert out.count("Run folder:") == out.count("gzip -9") == 1
    last = folder / "checkpoints/last.ckpt"
    assert last.is_file()

    run(workplace, *small, "--run_name=one")
    losses = [json.loads((path / "summary.json").read_text())["loss"] for path in (folder, folder.parent / "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    # the number of processes is part of the run's configuration; another one can continue it
    run(workplace, "fit", f"--ckpt_path={last}", "--trainer.max_steps=3")
    run(workplace, "fit", f"--ckpt_path={last}", "--trainer.max_steps=4", "--config", "trainer/cpu")
    assert torch.load(last, weights_only=True)["global_step"] == 4


def test_a_wheel_carries_the_configuration(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("lightning_moe", "conf"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(site), "."]
    subprocess.run(build, cwd=source, capture_output=True, check=True)
    (wheel,) = site.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = archive.namelist()
    assert sum(name.startswith("lightning_moe/conf/") for name in names) == len(list((source / "conf").rglob("*.yaml")))

    where = [sys.executable, "-c", "import lightning_moe.config.compose as c; print(c.__file__, c.conf_root())"]
    out = subprocess.run(
        where, env=os.environ | {"PYTHONPATH": str(site)}, cwd=workplace, capture_output=True, text=True
    )
    assert out.stdout.split() == [str(site / "lightning_moe/config/compose.py"), str(site / "lightning_moe/conf")]
    args = ("fit", "--config", "routing/token_choice", "--print_config")
    config: dict[str, Any] = yaml.safe_load(run(workplace, *args, PYTHONPATH=str(site)))
    assert config["model"]["routing"]["class_path"] == "lightning_moe.routing.TokenChoice"
