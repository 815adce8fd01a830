"""Continuing a run with other settings: refused, or used from that step on, said and recorded."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.small_run import Command

SMALL = ("--config", "small")


def continued(command: Command, *flags: str) -> tuple[int, str, str]:
    return command("fit", "--run_name=a", "--ckpt_path=last", *flags)


def groups(workplace: Path) -> list[dict[str, Any]]:
    content = torch.load(workplace / "runs/a/checkpoints/last.ckpt", weights_only=True)
    return list(content["optimizer_states"][0]["param_groups"])


def summary(workplace: Path) -> dict[str, Any]:
    content = json.loads((workplace / "runs/a/summary.json").read_text())
    assert isinstance(content, dict)
    return content


@pytest.fixture
def run(command: Command, workplace: Path) -> Path:
    """A run of two steps of eight windows of 16 tokens."""
    assert command("fit", *SMALL, "--run_name=a", "--trainer.max_steps=2")[0] == 0
    return workplace / "runs/a"


def test_rates_and_decay_of_the_command_line_are_used_and_said(
    command: Command, run: Path, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, out, err = continued(
        command, "--trainer.max_steps=3", "--model.optimizer.muon_lr=0.001", "--model.optimizer.weight_decay=0.1"
    )
    assert code == 0, err
    muon = [group for group in groups(workplace) if group["rule"] == "muon"]
    assert muon
    assert {(group["lr"], group["weight_decay"]) for group in muon} == {(0.001, 0.1)}
    assert "Continuing from step 2 with other settings: " in out
    assert "model.optimizer.muon_lr: 0.02 → 0.001" in out
    assert re.search(r"Learning rates from step 2 on: .*0\.02 → 0\.001", caplog.text)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["optimizer"]["muon_lr"] == 0.001

    [segment] = summary(workplace)["segments"]
    assert segment["step"] == 2
    assert segment["changed"]["model.optimizer.muon_lr"] == [0.02, 0.001]
    assert segment["changed"]["trainer.max_steps"] == [2, 3]
    assert json.loads((run / "segments.json").read_text()) == [segment]


def test_a_longer_run_has_the_rates_of_its_own_schedule_and_says_the_jump(
    command: Command, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Linear decay to a tenth: after 2 of 2 steps the factor is 0.1; in a run of 10 steps, that of step 2 is 0.8."""
    flags = ("--model.schedule.kind=linear", "--model.schedule.final_fraction=0.1")
    assert command("fit", *SMALL, "--run_name=b", "--trainer.max_steps=2", "--model.schedule.adamw_warmup_steps=0",
                   *flags)[0] == 0  # fmt: skip
    code, _, err = command("fit", "--run_name=b", "--ckpt_path=last", "--trainer.max_steps=10")
    assert code == 0, err
    said = re.search(r"Learning rates from step 2 on: .*?(\S+) → (\S+);", caplog.text)
    assert said
    assert float(said[2]) / float(said[1]) == pytest.approx((0.1 + 0.9 * 0.8) / 0.1, rel=1e-3)


def test_tokens_are_those_that_were_trained_on(command: Command, run: Path, workplace: Path) -> None:
    assert summary(workplace)["train_tokens"] == 2 * 8 * 16
    assert continued(command, "--trainer.max_steps=5", "--data.global_batch_size=4")[0] == 0
    assert summary(workplace)["train_tokens"] == (2 * 8 + 3 * 4) * 16
    assert summary(workplace)["micro_batch_size"] == 4


def test_each_part_is_recorded_and_an_earlier_checkpoint_forgets_the_later_ones(
    command: Command, run: Path, workplace: Path
) -> None:
    assert continued(command, "--trainer.max_steps=3", "--model.optimizer.adamw_lr=0.002")[0] == 0
    assert continued(command, "--trainer.max_steps=4", "--model.optimizer.adamw_lr=0.003")[0] == 0
    assert [segment["step"] for segment in summary(workplace)["segments"]] == [2, 3]
    earlier = "--ckpt_path=runs/a/checkpoints/previous.ckpt"
    assert command("fit", earlier, "--trainer.max_steps=5", "--model.optimizer.adamw_lr=0.002")[0] == 0
    assert [(segment["step"], list(segment["changed"])) for segment in summary(workplace)["segments"]] == [
        (2, ["model.optimizer.adamw_lr", "trainer.max_steps"]),
        (3, ["trainer.max_steps"]),
    ]


def test_neutral_keys_make_no_part(command: Command, run: Path, workplace: Path) -> None:
    code, out, err = continued(command, "--trainer.log_every_n_steps=2", "--checkpoint.every_n_train_steps=1")
    assert code == 0, err
    assert "other settings" not in out
    assert summary(workplace)["segments"] == []
    assert not (run / "segments.json").exists()


REFUSED = {
    "--seed_everything=2": "seed_everything=2: it has an effect only at the beginning of a run, and this one began",
    "--threshold_warmup.steps=2": "threshold_warmup.steps=2: the threshold warm-up of this run ended at step 2",
    "--trainer.max_steps=2": "trainer.max_steps=2: the checkpoint has 3 optimizer steps; must be at least that",
    "--model.init_from=x.ckpt": "model.init_from",
    "--model.optimizer.router_rule=adamw": "rule",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_what_has_done_its_work_is_refused(flag: str, command: Command, workplace: Path) -> None:
    assert command("fit", *SMALL, "--run_name=a", "--trainer.max_steps=3")[0] == 0
    before = (workplace / "runs/a/config.yaml").read_bytes()
    code, _, err = continued(command, "--trainer.max_steps=4", flag)
    assert code == 2, err
    assert REFUSED[flag] in err
    assert (workplace / "runs/a/config.yaml").read_bytes() == before


def test_a_warmup_that_goes_on_may_have_another_end(command: Command, workplace: Path) -> None:
    """A run that is stopped after two of six steps, while its warm-up of three goes on."""
    flags = ("--trainer.max_steps=6", "--threshold_warmup.steps=3", "--checkpoint.every_n_train_steps=2")
    assert command("fit", *SMALL, "--run_name=a", *flags, "--checkpoint.keep_all=true")[0] == 0
    code, out, err = command("fit", "--ckpt_path=runs/a/checkpoints/step-000002.ckpt", "--threshold_warmup.steps=4")
    assert code == 0, err
    assert "threshold_warmup.steps: 3 → 4" in out
    content = torch.load(workplace / "runs/a/checkpoints/last.ckpt", weights_only=True)
    assert content["callbacks"]["ThresholdWarmup"]["switched_at_step"] == 4
