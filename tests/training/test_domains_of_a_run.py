"""A run on a text of two domains: what its record, its summary, the commands and MLflow say about each."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.small_run import SMALL, Command

from lightning_moe.tracking import read_metrics

DOMAINS = {"code": "code", "songs & poems": "songs___poems"}  # and their parts of names


@pytest.fixture
def two_domains(workplace: Path) -> Path:
    """The workplace, with ``two.yaml``."""
    paths = {}
    for number, domain in enumerate(DOMAINS):
        folder = workplace / f"text{number}"
        folder.mkdir()
        paths[domain] = [str(folder)]
        for file in range(60):
            lines = [f"{'def' if number else 'rose'} {i} of {file} {(i * file) % 97}" for i in range(12)]
            (folder / f"{file:03}.txt").write_text("\n".join(lines))
    corpus = {"class_path": "LocalFiles", "init_args": {"paths": paths}}
    config = SMALL | {"data": SMALL["data"] | {"corpus": corpus, "validation_fraction": 0.1}}
    config["trainer"] = SMALL["trainer"] | {"limit_val_batches": 1.0, "limit_test_batches": 1.0}
    (workplace / "two.yaml").write_text(yaml.safe_dump(config))
    return workplace


def test_record_summary_and_commands_have_each_domain(command: Command, two_domains: Path) -> None:
    code, out, err = command("fit", "--config=two", "--run_name=a")
    assert code == 0, err
    run = two_domains / "runs/a"
    validations = [line for line in read_metrics(run) if "val/loss" in line]
    assert len(validations) == 2
    for line in validations:
        losses = [line[f"val/domain_loss/{part}"] for part in DOMAINS.values()]
        assert min(losses) < line["val/loss"] < max(losses)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["domains"] == {
        part: {"domain_loss": validations[-1][f"val/domain_loss/{part}"]} for part in DOMAINS.values()
    }
    code, tested, err = command("test", "--ckpt_path=last", "--run_name=a")
    assert code == 0, err
    for text in (out, tested):
        for part in DOMAINS.values():
            [shown] = re.findall(rf"^loss, {part} +(\d\.\d{{4}}) nats per token$", text, flags=re.MULTILINE)
            assert float(shown) == pytest.approx(summary["domains"][part]["domain_loss"], abs=1e-4)
    code, _, err = command("compare", "runs", "--output_dir=page", "--no_mlflow")
    assert code == 0, err


def test_a_text_of_one_domain_has_none_in_its_summary(command: Command, workplace: Path) -> None:
    code, out, err = command("fit", "--config=small", "--run_name=a", "--trainer.max_steps=2")
    assert code == 0, err
    assert json.loads((workplace / "runs/a/summary.json").read_text())["domains"] == {}
    assert "loss, " not in out
    assert not [name for line in read_metrics(workplace / "runs/a") for name in line if "domain_loss" in name]


@pytest.mark.slow
def test_mlflow_has_the_curve_of_each_domain(two_domains: Path) -> None:
    args = ("fit", "--config=two", "--run_name=a", "--tracking.enabled=true")
    command = [sys.executable, "-m", "lightning_moe", *args]
    done = subprocess.run(command, cwd=two_domains, env=os.environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{two_domains}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'lightning_moe'")
    (found,) = client.search_runs([experiment.experiment_id])
    summary = json.loads((two_domains / "runs/a/summary.json").read_text())
    for part in DOMAINS.values():
        name = f"val/domain_loss/{part}"
        assert found.data.metrics[name] == pytest.approx(summary["domains"][part]["domain_loss"])
        assert len(client.get_metric_history(found.info.run_id, name)) == 2
    description = found.data.tags["mlflow.note.content"]
    assert all(f"loss, {part}" in description for part in DOMAINS.values())
