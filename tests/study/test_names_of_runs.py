"""Names in sweep and study files, and by ``--name``, are what was typed, however much they look like numbers."""

import json
from pathlib import Path

import pytest
import yaml
from helpers.small_run import Command
from test_study import STAND_IN

from lightning_moe.config.compose import merge
from lightning_moe.study.main import run_study
from lightning_moe.study.spec import read_study
from lightning_moe.sweep import pool
from lightning_moe.sweep.spec import read_sweep
from lightning_moe.training.parse import parse

TEXTS = ("007", "1.50", "1e5", "0x1f", "2026_07_21", "2026-07-21", "on", "None")
SWEEP = "config: []\nspace: {model.optimizer.adamw_lr: {float: [1e-4, 1e-2]}}\nobjectives: {val/loss: minimize}\n"
SWEEP += "budget: {trials: 1}\n"


@pytest.mark.parametrize("text", TEXTS)
def test_a_sweep(text: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"{SWEEP}name: {text} # a comment\noutput_dir: {text}\n")
    sweep = read_sweep(path)
    assert (sweep.name, sweep.folder) == (text, Path(text, text))
    assert sweep.space.parameters[0].domain.low == 1e-4  # numbers stay numbers
    assert read_sweep(path, name="0o17").name == "0o17"
    assert read_sweep(path, name="null").name == text
    path.write_text(f"{SWEEP}name: null\noutput_dir:\n")
    assert read_sweep(path).folder == Path("runs/sweep")


def write_study(path: Path, text: str) -> None:
    path.write_text(
        f"name: {text}\noutput_dir: {text}\nconfig: [model/tiny, {{tracking.enabled: false}}]\n"
        "tune: {key: model.optimizer.muon_lr, values: [0.01, 0.02], seed: 9}\nseeds: [1]\n"
        f"baseline: {text}\nmethods:\n  {text}: {{include: [routing/token_choice]}}\n"
        f"  {text}x: {{as: {text}, model.optimizer.muon_momentum: 0.5}}\n"
        f"reference: {{source: none, loss: {{{text}: 3}}}}\n"
    )


@pytest.mark.parametrize("text", TEXTS)
def test_a_study(text: str, tmp_path: Path) -> None:
    write_study(tmp_path / "study.yaml", text)
    study = read_study(tmp_path / "study.yaml")
    assert (study.name, study.folder, study.baseline) == (text, Path(text, text), text)
    assert {name: method.tuned_as for name, method in study.methods.items()} == {text: text, f"{text}x": text}
    assert study.reference is not None
    assert study.reference.loss == {text: 3.0}
    assert merge(study.methods[f"{text}x"].layers)["model"]["optimizer"] == {"muon_momentum": 0.5}


def test_a_study_with_such_names_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_study(Path("study.yaml"), "1e5")
    monkeypatch.setattr(pool, "FIT", STAND_IN)
    run_study(read_study(Path("study.yaml")))
    (config,) = Path("1e5/1e5/compare").glob("1e5-*.yaml")
    assert yaml.safe_load(config.read_text())["tracking"]["experiment_name"] == "1e5"


@pytest.mark.slow
def test_a_sweep_and_a_study_with_such_names_train_by_the_real_command(command: Command, workplace: Path) -> None:
    small = "config: [small.yaml, {trainer.max_steps: 2}]"
    (workplace / "sweep.yaml").write_text(SWEEP.replace("config: []", f"name: 1e5\n{small}"))
    for _ in range(2):  # the second time it goes on, from what the first has written
        code, out, err = command("sweep", "sweep.yaml")
        assert code == 0, out + err
    assert (workplace / "runs/1e5/trial-0000-s1/summary.json").exists()
    write_study(workplace / "study.yaml", "007")
    text = (workplace / "study.yaml").read_text()
    (workplace / "study.yaml").write_text(text.replace("config: [model/tiny, ", "config: [small.yaml, "))
    code, out, err = command("study", "study.yaml")
    assert code == 0, out + err
    (run,) = (workplace / "007/007/compare").glob("007-*-s1/summary.json")
    assert json.loads(run.read_text())["run"] == run.parent.name


def test_a_trial_of_a_sweep_whose_name_is_like_a_number_can_be_parsed_again(tmp_path: Path) -> None:
    from lightning_moe.config.compose import Layer, load_layers
    from lightning_moe.sweep.configuration import write_trial_config

    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.replace("config: []", "config: [{tracking.experiment_name: '1e5'}]"))
    write_trial_config(read_sweep(path), {"model.optimizer.adamw_lr": 1e-3}, 1, tmp_path / "trial.yaml")
    layers = [*load_layers(tmp_path / "trial.yaml"), Layer(path, {})]
    assert parse(layers).config.tracking.experiment_name == "1e5"
