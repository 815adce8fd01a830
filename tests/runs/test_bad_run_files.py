"""A run's ``config.yaml`` and ``summary.json`` with other content than the program writes, in each reader."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.bad_content import EVERY, one_each, surprises, wrong_contents
from helpers.small_run import Command

from lightning_moe.analysis.pools import training_pool
from lightning_moe.compare import report
from lightning_moe.compare.groups import check_comparable, group
from lightning_moe.compare.runs import read_folders
from lightning_moe.routing import TokenChoice
from lightning_moe.runs.config import read_config
from lightning_moe.runs.loading import run_data
from lightning_moe.study.runs import _loss
from lightning_moe.sweep.results import final_values


@pytest.fixture
def run(command: Command, workplace: Path) -> Path:
    assert command("fit", "--config=small", "--run_name=a", "--trainer.max_steps=2")[0] == 0
    assert command("fit", "--run_name=a", "--ckpt_path=last", "--trainer.max_steps=3")[0] == 0
    return workplace / "runs/a"


def compare(folder: Path) -> None:
    runs, _ = read_folders([folder])
    check_comparable(runs)
    groups, _ = group(runs)
    report.rows(groups, groups[0])


@EVERY
@pytest.mark.parametrize("reader", ["compare", "analysis", "text"])
def test_every_key_of_the_configuration(reader: str, every: bool, run: Path) -> None:
    file = run / "config.yaml"

    def read(content: Any) -> None:
        file.write_text(yaml.safe_dump(content))
        if reader == "compare":
            compare(run)
        elif reader == "analysis":
            training_pool(TokenChoice(), 16, read_config(run))
        else:
            run_data(run / "checkpoints/last.ckpt", "--text")

    contents = wrong_contents(yaml.safe_load(file.read_text()))
    assert surprises(contents if every else one_each(contents), read, str(run)) == []


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "a: [", "2026-99-99", "? [a]\n: b", "[" * 3000, "a: &a [*a]", "data: 3", "\udcff"]
)
def test_a_configuration_that_is_none(text: str, run: Path) -> None:
    def read(content: bytes) -> None:
        (run / "config.yaml").write_bytes(content)
        for reader in (compare, lambda run: run_data(run / "checkpoints/last.ckpt", "--text")):
            reader(run)

    assert surprises(iter([("text", text.encode(errors="surrogateescape"))]), read, str(run)) == []


@EVERY
@pytest.mark.parametrize("reader", ["compare", "study", "sweep"])
def test_every_key_of_the_summary(reader: str, every: bool, run: Path) -> None:
    file = run / "summary.json"

    def read(content: Any) -> None:
        file.write_text(json.dumps(content))
        {"compare": compare, "study": _loss, "sweep": final_values}[reader](run)

    contents = wrong_contents(json.loads(file.read_text()))
    assert surprises(contents if every else one_each(contents), read, str(run)) == []


def test_commands_refuse_them_before_they_write(run: Path, command: Command, workplace: Path) -> None:
    ckpt = f"--ckpt_path={run}/checkpoints/last.ckpt"
    config, summary = (run / "config.yaml").read_text(), (run / "summary.json").read_text()
    for name, text in (("config.yaml", "- 1"), ("config.yaml", "{model: 3}"), ("summary.json", '{"loss": "text"}')):
        (run / "config.yaml").write_text(config)
        (run / "summary.json").write_text(summary)
        (run / name).write_text(text)
        lines = [("export", ckpt, "--output=out"), ("compare", str(run), "--no_mlflow", "--output_dir=out")]
        if name == "config.yaml":
            lines += [
                ("calibrate", ckpt, "--output_dir=out", f"--text={workplace}/small.yaml", "--max_tokens=64"),
                ("analyze", ckpt, "--no_mlflow", "--output_dir=out"),
                ("audit", ckpt),
            ]
        for line in lines:
            code, _, err = command(*line)
            assert code == 2, (line, err)
            assert name in err.splitlines()[-1]
            assert not (workplace / "out").exists()
