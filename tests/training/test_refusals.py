"""A refused command changes nothing, and a run that was killed early is continued with its own configuration."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.small_run import Command

SMALL = ("--config", "small")

#: continuations of a run of 2 steps that are refused, at ever later moments of the start
REFUSED = {
    "a key that does not exist": (("--data.sede=7",), "sede"),
    "another order of the data": (("--data.seed=7",), r"data\.seed=7"),
    "another architecture": (("--model.decoder.num_experts=8",), "num_experts"),
    "other text": (("--data.corpus.paths=[other.txt]",), "data"),
    "a trainer that cannot be": (("--trainer.devices=-3",), "devices"),
    "inference only": (("--model.inference_num_experts_per_token=1.5",), "inference_num_experts_per_token"),
}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_refused_continuation_leaves_the_run_as_it_was(command: Command, workplace: Path) -> None:
    assert command("fit", *SMALL, "--run_name=a", "--trainer.max_steps=2")[0] == 0
    words = " ".join(f"w{number}" for number in range(4000))
    (workplace / "other.txt").write_text(words)
    before = files(workplace / "runs")
    for name, (flags, message) in REFUSED.items():
        code, _, err = command("fit", "--run_name=a", "--ckpt_path=last", "--trainer.max_steps=3", *flags)
        assert code == 2, (name, err)
        assert re.search(message, err), (name, err)
        assert files(workplace / "runs") == before, name
    assert command("fit", "--run_name=a", "--ckpt_path=last", "--trainer.max_steps=3")[0] == 0


def test_a_refused_evaluation_leaves_no_record(command: Command, workplace: Path) -> None:
    assert command("fit", *SMALL, "--run_name=a", "--trainer.max_steps=2")[0] == 0
    before = files(workplace / "runs")
    for name in ("validate", "test"):
        code, _, err = command(name, "--run_name=a", "--ckpt_path=last", "--data.tokenizer.vocab_size=290")
        assert code == 2, err
        assert files(workplace / "runs") == before


def test_a_refused_new_run_leaves_its_name_free(command: Command, workplace: Path) -> None:
    for flags in (("--trainer.devices=-3",), ("--model.inference_num_experts_per_token=1.5",)):
        assert command("fit", *SMALL, "--run_name=a", *flags)[0] == 2
        assert not list(workplace.glob("runs/*"))
    assert command("fit", *SMALL, "--run_name=a", "--trainer.max_steps=1")[0] == 0


@pytest.mark.parametrize("moment", ["config.yaml", "metrics.jsonl"])
def test_a_run_killed_before_its_first_checkpoint_begins_again_as_itself(
    moment: str, command: Command, workplace: Path
) -> None:
    """Our own messages advise ``--ckpt_path last --run_name``; without the run's file that would train the default."""
    arguments = ["fit", *SMALL, "--run_name=a", "--model.decoder.hidden_size=48", "--trainer.max_steps=100000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_moe", *arguments, "--checkpoint.every_n_train_steps=0"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (workplace / "runs/a" / moment).exists():
            assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()

    code, _, err = command("fit", "--run_name=a", "--ckpt_path=last", "--trainer.max_steps=2")

    assert code == 0, err
    assert "starting from scratch" in err
    config = yaml.safe_load((workplace / "runs/a/config.yaml").read_text())
    assert config["model"]["decoder"]["hidden_size"] == 48
    assert config["trainer"]["max_steps"] == 2


def test_a_refused_new_run_leaves_no_folder_above_its_own(command: Command, workplace: Path) -> None:
    (workplace / "there").mkdir()
    for folder in ("new/deep", "there", "there/new"):
        code, *_ = command("fit", "--config=small", "--output_dir", folder, "--model.decoder.hidden_size=7")
        assert code == 2
    assert not (workplace / "new").exists()
    assert list((workplace / "there").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [("metrics.jsonl", '{"step": "x", "time": 1.0}'), ("tracking.jsonl", '{"event": "tags", "time": 1}')],
)
def test_a_damaged_record_is_refused_before_anything_is_written(
    name: str, line: str, command: Command, workplace: Path
) -> None:
    assert command("fit", *SMALL, "--run_name=a", "--trainer.max_steps=2")[0] == 0
    with (workplace / "runs/a" / name).open("a") as file:
        file.write(f"{line}\n")
    before = files(workplace / "runs")
    code, _, err = command("fit", "--run_name=a", "--ckpt_path=last", "--trainer.max_steps=4")
    assert code == 2, err
    assert f"runs/a/{name}" in err
    assert files(workplace / "runs") == before


def test_an_unknown_backend_is_refused(command: Command) -> None:
    strategy = "lightning_moe.training.strategy.FullyShardedStrategy"
    code, _, err = command(
        "fit", *SMALL, f"--trainer.strategy={strategy}", "--trainer.strategy.process_group_backend=x"
    )
    assert code == 2
    assert "process_group_backend='x': must be one of" in err


def test_a_folder_in_the_place_of_the_summary_is_refused_before_training(command: Command, workplace: Path) -> None:
    assert command("fit", "--config=small", "--run_name=a")[0] == 0
    summary = workplace / "runs/a/summary.json"
    summary.unlink()
    summary.mkdir()
    before = (workplace / "runs/a/metrics.jsonl").read_bytes()
    code, _, err = command("fit", "--run_name=a", "--ckpt_path=last", "--trainer.max_steps=6")
    assert code == 2
    assert "summary.json" in err
    assert (workplace / "runs/a/metrics.jsonl").read_bytes() == before
