"""Names and paths are what was typed, however much they look like numbers, dates or booleans to YAML."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.small_run import Command
from omegaconf import OmegaConf

from lightning_moe.config.yaml_text import dump_yaml, load_yaml

TEXTS = (
    "007",
    "1.10",
    "1.50",
    "1e5",
    "1.5e5",
    "5e10987",
    "0x1f",
    "0o17",
    "1_000",
    "2026_07_21",
    "2026-07-21",
    "on",
    "yes",
    "true",
    "nan",
    "None",
    "nullable",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_typed_name_or_path_is_looked_for_as_it_is(text: str, command: Command) -> None:
    for flags in ([f"--run_name={text}", f"--output_dir={text}"], ["--run_name", text, "--output_dir", text]):
        code, _, err = command("validate", "--ckpt_path", "last", *flags)
        assert (code, err) == (2, f"error: ckpt_path='last': no checkpoint under {text}/{text}\n")
    for command_name in ("fit", "validate"):
        code, _, err = command(command_name, f"--ckpt_path={text}")
        assert (code, err) == (2, f"error: ckpt_path={text!r}: no such file\n")


@pytest.mark.parametrize("text", TEXTS)
def test_a_name_or_path_in_a_file_is_looked_for_as_it_is(text: str, command: Command, workplace: Path) -> None:
    (workplace / "names.yaml").write_text(f"run_name: {text} # a comment\n'output_dir':   {text}\nckpt_path: last\n")
    code, _, err = command("validate", "--config", "names")
    assert (code, err) == (2, f"error: ckpt_path='last': no checkpoint under {text}/{text}\n")
    (workplace / "path.yaml").write_text(f"{{trainer: {{max_steps: 2}}, ckpt_path: {text}}}")
    code, _, err = command("validate", "--config", "path")
    assert (code, err) == (2, f"error: ckpt_path={text!r}: no such file\n")


@pytest.mark.parametrize("text", ["007", "1e5", "2026_07_21", "2026-07-21", "on"])
def test_the_printed_configuration_keeps_names_and_paths(text: str, command: Command, workplace: Path) -> None:
    (workplace / "names.yaml").write_text(f"run_name: {text}\noutput_dir: {text}\n")
    first = command("fit", "--config", "names", "--print_config")[1]
    (workplace / "printed.yaml").write_text(first)
    assert command("fit", "--config", "printed", "--print_config")[1] == first
    for read in (yaml.safe_load(first), OmegaConf.create(first)):
        assert (read["run_name"], read["output_dir"]) == (text, text)


@pytest.mark.parametrize(
    ("flags", "content", "where"),
    [
        ([], "run_name: null", "runs"),
        ([], "run_name: ~", "runs"),
        ([], "run_name:", "runs"),
        ([], "run_name: 'null'", "runs/null"),
        ([], "run_name: None", "runs/None"),
        (["--run_name=null"], "run_name: a", "runs"),
        (["--run_name="], "run_name: a", "runs"),
        (["--run_name=None"], "run_name: a", "runs/None"),
        (["--output_dir=null"], "output_dir: a", "runs"),
        (["--run_name=b", "--run_name", "c"], "run_name: a", "runs/c"),
    ],
)
def test_null_is_no_name_and_other_words_are(
    flags: list[str], content: str, where: str, command: Command, workplace: Path
) -> None:
    (workplace / "names.yaml").write_text(content)
    code, _, err = command("validate", "--config", "names", "--ckpt_path=last", *flags)
    assert (code, err) == (2, f"error: ckpt_path='last': no checkpoint under {where}\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run_name=~"], "run_name='~': must be a plain folder name"),
        (["--run_name"], "--run_name: needs a value"),
        (["--output_dir", "--seed_everything=1"], "--output_dir: needs a value"),
        (["--config", "list.yaml"], r"run_name=['a'] ("),
        (["--output_dir=${no.such}"], "run_name, output_dir, ckpt_path: Interpolation key 'no.such' not found"),
    ],
)
def test_what_is_no_name_is_answered_in_one_line(
    flags: list[str], message: str, command: Command, workplace: Path
) -> None:
    (workplace / "list.yaml").write_text("run_name: [a]")
    code, _, err = command("fit", *flags)
    assert code == 2
    assert err.startswith(f"error: {message}"), err


def test_interpolation_in_names_sees_files_and_flags(command: Command, workplace: Path) -> None:
    (workplace / "names.yaml").write_text("run_name: 007\noutput_dir: of-${run_name}/${seed_everything}\n")
    for flags, where in (([], "of-007/1/007"), (["--seed_everything=7", "--run_name=1e5"], "of-1e5/7/1e5")):
        code, _, err = command("validate", "--config", "names", "--ckpt_path=last", *flags)
        assert (code, err) == (2, f"error: ckpt_path='last': no checkpoint under {where}\n")
    out = command("fit", "--config", "names", "--tracking.experiment_name=${run_name}", "--print_config")[1]
    assert yaml.safe_load(out)["tracking"]["experiment_name"] == "007"


def test_runs_with_names_like_numbers_are_continued_and_validated(command: Command, workplace: Path) -> None:
    for text in ("1.1", "1.10", "1e5"):
        again = (f"--run_name={text}", "--ckpt_path=last", f"--output_dir={text}")
        for steps in (1, 2):
            code, _, err = command("fit", "--config=small", *again, f"--trainer.max_steps={steps}")
            assert code == 0, err
            assert ("starting from scratch" in err) == (steps == 1)
        folder = workplace / text / text
        assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
        assert yaml.safe_load((folder / "config.yaml").read_text())["output_dir"] == text
        code, _, err = command("validate", *again)
        assert code == 0, err
        assert len(list((folder / "evaluations").iterdir())) == 1
        code, _, err = command("validate", "--ckpt_path", f"{text}/{text}/checkpoints/last.ckpt")
        assert code == 0, err
    assert {path.name for path in workplace.iterdir() if path.is_dir()} == {"1.1", "1.10", "1e5"}


@pytest.mark.slow
@pytest.mark.parametrize("text", ["007", "2026_07_21", "5e10987"])
def test_the_command_in_a_process_of_its_own(text: str, workplace: Path) -> None:
    (workplace / "name.yaml").write_text(f"run_name: {text}\n")
    for command_name, steps in (("fit", 1), ("fit", 2), ("validate", 2)):
        args = [command_name, "--config=small", "--config=name", "--ckpt_path=last", f"--trainer.max_steps={steps}"]
        done = subprocess.run(
            [sys.executable, "-m", "lightning_moe", *args],
            cwd=workplace,
            env=os.environ,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert [path.name for path in (workplace / "runs").iterdir()] == [text]
    assert json.loads((workplace / f"runs/{text}/summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize("value", [*TEXTS, "null", "~", "-1E5", "a: b", "${x}", "é"])
def test_dumped_text_is_text_for_every_reader(value: str, tmp_path: Path) -> None:
    text = dump_yaml({"key": value, "list": [value]})
    (tmp_path / "file.yaml").write_text(text)
    for read in (yaml.safe_load(text), OmegaConf.to_container(load_yaml(tmp_path / "file.yaml"))):
        assert read == {"key": value, "list": [value]}


def test_only_the_chosen_scalars_become_text(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("name: 1e3\nrate: 1e-3\nrows: {1.0: {as: 007, name: 7}, on: {as: null}}\nloss: {0x1f: 0.5}\n")
    content = OmegaConf.to_container(load_yaml(path, ("name", "rows.*.as"), ("rows", "loss")))
    rows = {"1.0": {"as": "007", "name": 7}, "on": {"as": None}}
    assert content == {"name": "1e3", "rate": 0.001, "rows": rows, "loss": {"0x1f": 0.5}}
