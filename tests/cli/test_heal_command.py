"""Healing on the command line: a run like any other, checkpoints without the model, export, refused input."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.hf_models import make_folder
from helpers.small_run import Command
from torch import Tensor

from lightning_moe.hf import load_model, open_model, route_by_thresholds
from lightning_moe.hf.tokenizer import model_tokenizer
from lightning_moe.module import LanguageModel
from lightning_moe.runs.loading import run_data
from lightning_moe.sweep.configuration import parse_trial
from lightning_moe.sweep.spec import read_sweep

EXPERTS_PER_TOKEN = 1.5


@pytest.fixture
def heal(workplace: Path, small_data: dict[str, Any]) -> Path:
    """A tiny model in ``model`` and ``heal.yaml`` that heals it in four steps."""
    make_folder("qwen3_moe", workplace / "model")
    config = {
        "include": ["experiment/heal"],
        "model": {
            "pretrained": {"path": "model", "num_experts_per_token": EXPERTS_PER_TOKEN, "distill": 0.5},
            "schedule": {"kind": "constant", "adamw_warmup_steps": 1},
        },
        "data": {"corpus": small_data["corpus"], "sequence_length": 32, "global_batch_size": 4},
        "threshold_warmup": {"steps": 0},
        "tracking": {"enabled": False},
        "trainer": {
            "max_steps": 4, "val_check_interval": 4, "limit_val_batches": 2, "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
    }  # fmt: skip
    (workplace / "heal.yaml").write_text(yaml.safe_dump(config))
    return workplace


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def content(run: str, name: str = "last") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(f"runs/{run}/checkpoints/{name}.ckpt", weights_only=True)
    return found


def test_run_is_recorded_truthfully_and_every_command_opens_its_checkpoint(command: Command, heal: Path) -> None:
    before = digests(heal / "model")
    code, out, err = command("fit", "--config", "heal", "--run_name=a")
    assert code == 0, err
    assert digests(heal / "model") == before

    config = yaml.safe_load(Path("runs/a/config.yaml").read_text())
    assert "decoder" not in config["model"]
    assert config["model"]["pretrained"]["path"] == config["data"]["tokenizer"]["file"] == str(heal / "model")
    assert config["data"]["tokenizer"]["vocab_size"] == model_tokenizer("model").vocab_size
    summary = yaml.safe_load(Path("runs/a/summary.json").read_text())
    lm = load_model("model")
    assert summary["total_parameters"] == sum(parameter.numel() for parameter in lm.model.parameters())
    tokens, text = summary["data"]["validation_tokens"], summary["data"]["validation_bytes"]
    assert (
        abs(summary["bits_per_byte"] / (summary["loss"] * tokens / text / 0.6931) - 1) < 0.15
    )  # on a part of the text
    metrics = [yaml.safe_load(line) for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    assert any("train/distillation_loss" in line for line in metrics)

    saved = content("a")
    assert saved["hyper_parameters"]["decoder"]["num_experts"] == 8
    assert saved["hyper_parameters"]["pretrained"]["digest"]
    names = {name.rpartition(".")[0] for name in saved["state_dict"]}
    assert names == {
        *(f"decoder.model.{layer.path}" for layer in lm.layers),
        *(f"decoder.moe.{name}.state" for name in lm.moe),
    }

    ckpt = "runs/a/checkpoints/last.ckpt"
    code, out, err = command("validate", "--ckpt_path", ckpt)
    assert code == 0, err
    assert f"{summary['loss']:.4f}" in out
    for arguments in (
        ("generate", "--ckpt_path", ckpt, "--prompt", "line 1", "--max_new_tokens=4", "--show_routing"),
        ("analyze", "--ckpt_path", ckpt, "--max_tokens=256", "--output_dir=report"),
        ("audit", "--ckpt_path", ckpt),
        ("calibrate", "--ckpt_path", ckpt, "--output_dir=again", "--num_experts_per_token", "1", "--max_tokens=1024"),
        ("validate", "--ckpt_path=again/checkpoints/last.ckpt"),
        ("fit", "--config", "heal", f"--model.init_from={ckpt}", "--trainer.max_steps=1", "--run_name=c"),
    ):
        code, out, err = command(*arguments)
        assert code == 0, (arguments, out, err)
    assert digests(heal / "model") == before

    (heal / "model").rename(heal / "elsewhere")
    code, _, err = command("generate", "--ckpt_path", ckpt, "--prompt", "a")
    assert code == 2
    assert "and the model itself is not on this machine" in err
    make_folder("qwen3_moe", heal / "model", seed=1)
    for arguments in (("generate", "--ckpt_path", ckpt, "--prompt", "a"), ("validate", "--ckpt_path", ckpt)):
        code, _, err = command(*arguments)
        assert code == 2
        assert "the model has changed, or is another one" in err
        assert err.count("\n") == 1, err


def test_resumed_healing_equals_an_unbroken_one(command: Command, heal: Path) -> None:
    for arguments in (
        ("--run_name=whole",),
        ("--run_name=parts", "--trainer.max_steps=2", "--trainer.val_check_interval=2"),
        ("--run_name=parts", "--ckpt_path=last"),
    ):
        code, _, err = command("fit", "--config", "heal", *arguments)
        assert code == 0, err
    whole, parts = content("whole"), content("parts")
    assert whole["global_step"] == parts["global_step"] == 4
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, parts["state_dict"][name]), name
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (whole, parts)]
    for number, state in moments[0].items():
        for key, value in state.items():
            assert torch.equal(value, moments[1][number][key])


def test_first_step_updates_the_thresholds_from_its_batch(command: Command, heal: Path) -> None:
    """The first MoE layer's logits do not depend on routing, so the untouched model gives them."""
    assert command("fit", "--config", "heal", "--run_name=a", "--trainer.max_steps=1")[0] == 0
    data = run_data(Path("runs/a/checkpoints/last.ckpt"), "", model_tokenizer("model"))
    data.setup("fit")
    lm = load_model("model")
    with torch.no_grad():
        lm(next(iter(data.train_dataloader()))["input_ids"])
    layer = lm.layers[0]
    assert layer.record is not None
    scores: Tensor = layer.record.logits.double().log_softmax(-1).flatten(0, 1)
    k = round(len(scores) * EXPERTS_PER_TOKEN / 8)
    expected = torch.stack([column.sort(descending=True).values[k - 1] for column in scores.T])
    found = content("a")["state_dict"]["decoder.moe.0.state.cutoff"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(content("a")["state_dict"]["decoder.moe.0.state.threshold"], found)  # of the first batch


def test_export_loads_again_bit_for_bit(command: Command, heal: Path) -> None:
    make_folder("mixtral", heal / "model")  # its experts are stored in another form than they are held
    before = digests(heal / "model")
    assert command("fit", "--config", "heal", "--run_name=a", "--model.pretrained.train=[routers,norms]")[0] == 0
    ckpt = "runs/a/checkpoints/last.ckpt"
    code, _, err = command("export", "--ckpt_path", ckpt, "--output=healed")
    assert code == 0, err
    healed = LanguageModel.load_from_checkpoint(ckpt)
    ids = torch.randint(500, (3, 24), generator=torch.Generator().manual_seed(0))
    opened, _ = open_model("healed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained("healed", dtype="auto")
    route_by_thresholds(plain, "healed")
    with torch.no_grad():
        expected = healed.decoder(ids).logits
        assert torch.equal(opened(ids).logits, expected)
        assert torch.equal(plain(ids).logits, expected)
    assert AutoTokenizer.from_pretrained("healed")("words").input_ids
    code, _out, err = command("generate", "--model=healed", "--prompt", "line", "--max_new_tokens=3")
    assert code == 0, err
    assert digests(heal / "model") == before
    for arguments, message in (
        (("--output=healed",), "exists; --overwrite replaces it"),
        (("--output=model", "--overwrite"), "exists and is not an exported folder"),
        (("--output=other", "--tokenizer=x.json"), "a healed model keeps the tokenizer of"),
    ):
        code, _, err = command("export", "--ckpt_path", ckpt, *arguments)
        assert code == 2, err
        assert message in err
    assert command("export", "--ckpt_path", ckpt, "--output=healed", "--overwrite")[0] == 0


def test_bad_input_is_one_line(command: Command, heal: Path) -> None:
    for arguments, message in (
        (("--model.decoder.hidden_size=64",), "model.decoder.hidden_size (the command line): describes a decoder"),
        (("--config", "model/small"), "describes a decoder that is made here"),
        (("--data.tokenizer.vocab_size=300",), "data.tokenizer.vocab_size=300: the tokenizer of"),
        (("--model.pretrained.path=none",), "model.pretrained.path"),
        (("--model.pretrained.train=[routers,heads]",), "model.pretrained.train"),
        (("--model.pretrained.num_experts_per_token=9",), "the model has 8 experts per MoE layer"),
        (("--model.routing=null",), "model.routing=null: a released model keeps its experts"),
        (("--data.sequence_length=65",), "data.sequence_length=65: the context of"),
        (
            ("--config", "trainer/fsdp", "--trainer.accelerator=cpu"),
            "trainer.strategy=FullyShardedStrategy: a released",
        ),
        (("--trainer.precision=bf16-true",), "trainer.precision=bf16-true: a released model is healed in"),
    ):
        code, _, err = command("fit", "--config", "heal", "--run_name=bad", *arguments)
        assert code == 2, (arguments, err)
        assert message in err, (arguments, err)
        assert len(err.strip().splitlines()) == 1, err
        assert not Path("runs/bad").exists()


def test_sweep_over_a_healing_parses(heal: Path) -> None:
    key = "model.pretrained.num_experts_per_token"
    sweep = {
        "config": ["heal.yaml"],
        "space": {key: {"float": [1.0, 2.0]}, "model.pretrained.distill": {"choices": [0.0, 1.0]}},
        "objectives": {"val/loss": "minimize"},
        "budget": {"trials": 1},
    }
    (heal / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    parsed = parse_trial(read_sweep(Path("sweep.yaml")), {key: 1.25, "model.pretrained.distill": 1.0}, seed=3)
    assert parsed.config.model.pretrained.num_experts_per_token == 1.25
    assert parsed.config.model.pretrained.distill == 1.0
    assert "decoder" not in yaml.safe_load(parsed.to_yaml())["model"]
