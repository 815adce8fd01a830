"""One run that goes on under other numbers of processes, with checkpoints of another kind each time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.small_run import Command

from lightning_moe.checkpoints.read import read_checkpoint
from lightning_moe.tracking import read_metrics

TWO = ("--trainer.accelerator=cpu", "--trainer.devices=2")
SHARDED = "--trainer.strategy.save_distributed_checkpoint=true"


def fit(workplace: Path, *args: str) -> None:
    command = [sys.executable, "-m", "lightning_moe", "fit", *args, "--trainer.limit_val_batches=1.0"]
    done = subprocess.run(
        command, cwd=workplace, env=os.environ, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("ends", [(2, 4), (3, 4)])  # with a validation after the last step, and without
def test_a_finished_run_that_goes_on_is_recorded_without_a_gap(
    command: Command, workplace: Path, ends: tuple[int, int]
) -> None:
    for steps in ends:
        again = ("--config=small", "--run_name=r", "--ckpt_path=last", f"--trainer.max_steps={steps}")
        assert command("fit", *again)[0] == 0
    lines = list(read_metrics(workplace / "runs/r"))
    assert [line["step"] for line in lines if "train/loss" in line] == [0, 1, 2, 3]
    assert [line["step"] for line in lines if "val/loss" in line][-1] == 3


@pytest.mark.slow
def test_a_run_goes_on_from_a_folder_to_a_file_and_back(workplace: Path) -> None:
    last, previous = (workplace / f"runs/r/checkpoints/{name}.ckpt" for name in ("last", "previous"))
    rule = ("--model.routing=TokenChoice", "--model.schedule.kind=constant")  # whose loss no layout changes
    fit(workplace, "--config=small", *rule, "--run_name=one", "--trainer.max_steps=6")

    new, again = ("--config=small", *rule, "--run_name=r"), ("--run_name=r", "--ckpt_path=last")
    fit(workplace, *new, "--config=trainer/expert_parallel", *TWO, SHARDED, "--trainer.max_steps=2")
    assert last.is_dir()
    fit(workplace, *again, "--config=trainer/cpu", "--trainer.max_steps=4")
    assert (last.is_file(), previous.is_dir()) == (True, True)
    fit(workplace, *again, "--config=trainer/fsdp", *TWO, SHARDED, "--trainer.max_steps=6")
    assert (last.is_dir(), previous.is_file()) == (True, True)

    losses = [
        {line["step"]: line["train/loss"] for line in read_metrics(workplace / "runs" / name) if "train/loss" in line}
        for name in ("one", "r")
    ]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    whole, moved = (read_checkpoint(path) for path in (workplace / "runs/one/checkpoints/last.ckpt", last))
    assert moved["TextDataModule"]["position"] == whole["TextDataModule"]["position"] == 6 * 8
    for name, tensor in whole["state_dict"].items():
        torch.testing.assert_close(moved["state_dict"][name], tensor, rtol=0, atol=1e-4)
