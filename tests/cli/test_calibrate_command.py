"""calibrate on the command line: the folder that it writes is one that every other command takes."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers.small_run import Command
from omegaconf import OmegaConf

CKPT = "runs/a/checkpoints/last.ckpt"


def trained(command: Command, *flags: str) -> None:
    code, _, err = command("fit", "--config", "small", "--run_name=a", *flags)
    assert code == 0, err


def test_a_calibrated_run_is_validated_audited_and_continued(command: Command) -> None:
    trained(command)
    code, out, err = command(
        "calibrate", "--ckpt_path", CKPT, "--output_dir=runs/b", "--max_tokens=2000", "--num_experts_per_token=0.5"
    )
    assert code == 0, err
    assert "ExpertThreshold -> ExpertThreshold" in out
    report = json.loads(Path("runs/b/calibration.json").read_text())
    [usage] = report["after"]["other windows of it"]["usage"]
    assert sum(usage) / 4 == pytest.approx(1, abs=0.3)
    before, after = (torch.load(path, weights_only=True) for path in (CKPT, "runs/b/checkpoints/last.ckpt"))
    changed = {
        name for name, value in after["state_dict"].items() if not torch.equal(value, before["state_dict"][name])
    }
    prefix = "decoder.blocks.1.moe.state."
    assert changed == {prefix + name for name in ("threshold", "cutoff", "sketch", "ema_weight")}
    assert yaml.safe_load(Path("runs/b/config.yaml").read_text())["model"]["decoder"]["num_experts_per_token"] == 0.5

    new = "runs/b/checkpoints/last.ckpt"
    code, out, err = command("validate", "--ckpt_path", new)
    assert code == 0, err
    code, out, err = command("audit", "--ckpt_path", new)
    assert code == 0, err
    code, out, err = command(
        "fit", "--config=runs/b/config.yaml", "--ckpt_path", new, "--run_name=c", "--trainer.max_steps=6"
    )
    assert code == 0, err
    resumed = torch.load("runs/c/checkpoints/last.ckpt", weights_only=True)
    assert resumed["global_step"] == 6
    assert resumed["hyper_parameters"]["decoder"]["num_experts_per_token"] == 0.5


def test_a_dense_run_is_upcycled_and_trained_from_there(command: Command) -> None:
    trained(command, "--config=routing/dense")
    code, out, err = command("calibrate", "--ckpt_path", CKPT, "--output_dir=runs/b", "--max_tokens=2000")
    assert code == 0, err
    assert "dense -> ExpertThreshold" in out
    new = "runs/b/checkpoints/last.ckpt"
    assert "optimizer_states" not in torch.load(new, weights_only=True)
    command_line = ("fit", "--config=runs/b/config.yaml", f"--model.init_from={new}", "--run_name=c")
    code, out, err = command(*command_line, "--model.optimizer.muon_lr=0", "--model.optimizer.adamw_lr=0")
    assert code == 0, err
    start, end = (torch.load(f"runs/{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in "bc")
    experts = "decoder.blocks.1.moe.experts.up"
    assert torch.equal(start[experts], end[experts])  # it did start from there: at a rate of 0 nothing has moved
    code, _, err = command(*command_line[:2], "--run_name=d", "--model.init_from=gone.ckpt")
    assert code == 2
    assert "model.init_from: gone.ckpt: no such file" in err
    assert not Path("runs/d").exists()
    code, _, err = command(
        "fit", "--config=small", "--run_name=e", f"--model.init_from={new}", "--model.decoder.num_experts=8"
    )
    assert code == 2
    assert "model.decoder.num_experts: checkpoint 4, this model 8" in err
    assert not Path("runs/e").exists()


def test_the_dial_at_validation(command: Command) -> None:
    trained(command)
    losses = []
    for flags in ((), ("--model.inference_num_experts_per_token=2",), ("--model.inference_num_experts_per_token=1",)):
        code, out, err = command("validate", "--ckpt_path", CKPT, *flags)
        assert code == 0, err
        losses.append([line for line in out.splitlines() if line.startswith(("loss", "  layer_01"))])
    assert losses[0] == losses[2] != losses[1]
    for command_name, value, message in (
        ("validate", "9", "at most 4"),
        ("validate", "0.01", "for another number use `calibrate`"),
        ("fit", "1", "for validate, test and predict"),
    ):
        target = ("--ckpt_path", CKPT) if command_name == "validate" else ("--config=small", "--run_name=z")
        code, _, err = command(command_name, *target, f"--model.inference_num_experts_per_token={value}")
        assert code == 2
        assert message in err


def test_bad_input_is_refused_and_nothing_written(command: Command, workplace: Path) -> None:
    trained(command)
    (workplace / "short.txt").write_text("too short")
    (workplace / "taken").mkdir()
    for arguments, message in (
        (("--ckpt_path=gone.ckpt", "--output_dir=runs/b"), "no such file"),
        ((f"--ckpt_path={CKPT}", "--output_dir=taken"), "--output_dir taken: exists"),
        ((f"--ckpt_path={CKPT}", "--output_dir=small.yaml/new"), "small.yaml/new: cannot be written: Not a directory"),
        ((f"--ckpt_path={CKPT}", "--output_dir=runs/b", "--text=gone.txt"), "--text gone.txt"),
        ((f"--ckpt_path={CKPT}", "--output_dir=runs/b", "--text=short.txt"), "at least two windows of 17"),
        ((f"--ckpt_path={CKPT}", "--output_dir=runs/b", "--num_experts_per_token=9"), "at most num_experts=4"),
        ((f"--ckpt_path={CKPT}", "--output_dir=runs/b", "--device=nowhere"), "--device nowhere"),
        ((f"--ckpt_path={CKPT}",), "--output_dir"),
    ):
        code, _, err = command("calibrate", *arguments)
        assert code == 2
        assert message in err
        assert "Traceback" not in err
        assert not Path("runs/b").exists()


def test_a_name_like_a_number_stays_a_name(command: Command) -> None:
    trained(command)
    assert command("calibrate", f"--ckpt_path={CKPT}", "--output_dir=runs/1e5", "--max_tokens=2000")[0] == 0
    assert OmegaConf.load("runs/1e5/config.yaml").run_name == "1e5"


def test_a_configuration_that_cannot_be_read_is_refused_before_the_work(command: Command) -> None:
    trained(command)
    Path("runs/a/config.yaml").write_text("[" * 100)
    code, out, err = command("calibrate", f"--ckpt_path={CKPT}", "--output_dir=runs/b", "--max_tokens=2000")
    assert (code, out) == (2, "")
    assert "runs/a/config.yaml: is not YAML: line 1: is nested more than" in err


def test_a_model_without_moe_layers_is_refused(command: Command) -> None:
    assert (
        command("fit", "--config=small", "--run_name=a", "--trainer.max_steps=1", "--model.decoder.num_layers=1")[0]
        == 0
    )
    code, _, err = command("calibrate", f"--ckpt_path={CKPT}", "--output_dir=runs/b")
    assert code == 2
    assert "has no MoE layer to calibrate: num_layers=1, of which num_dense_layers=1 are dense" in err
