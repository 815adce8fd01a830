"""Parsing as sweeps, studies and plans use it, and what a run's folder from before a move of classes says."""

import os
import random
from pathlib import Path

import pytest
import torch
from helpers.small_run import Command

from lightning_moe.config.compose import Layer, compose
from lightning_moe.config.request import DEFAULT_EXPERIMENT
from lightning_moe.errors import UserError
from lightning_moe.training.parse import parse


def test_parsing_changes_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = [*compose(["small"], DEFAULT_EXPERIMENT), Layer(Path("x"), {"seed_everything": 5})]
    before = dict(os.environ), torch.get_rng_state(), random.getstate(), sorted(workplace.rglob("*"))
    parsed = parse(layers, ["--trainer.max_steps=3"])
    assert (parsed.config.trainer.max_steps, parsed.config.data.seed) == (3, 5)
    with pytest.raises(UserError, match=r"did you mean '--model.decoder.hidden_size'"):
        parse(layers, ["--model.decoder.hiden_size=3"])
    assert dict(os.environ) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert random.getstate() == before[2]
    assert sorted(workplace.rglob("*")) == before[3]
    assert capsys.readouterr() == ("", "")


def test_the_dumped_configuration_parses_to_itself(workplace: Path) -> None:
    changes = {"tracking": {"experiment_name": "1e5", "tags": {"name": "1.5e3"}}, "output_dir": "0x1f"}
    layers = [*compose(["small"], DEFAULT_EXPERIMENT), Layer(Path("x"), changes)]
    text = parse(layers).to_yaml(run_name=None)
    (workplace / "dumped.yaml").write_text(text)
    again = parse(compose(["dumped"], DEFAULT_EXPERIMENT))
    assert again.to_yaml() == text
    assert again.config.tracking.tags["name"] == "1.5e3"


def test_what_is_built_has_the_configured_values(workplace: Path) -> None:
    built = parse(compose(["small"], DEFAULT_EXPERIMENT), ["--data.sequence_length=32"]).build()
    assert built.data.sequence_length == built.model.decoder.config.max_sequence_length == 32
    with pytest.raises(UserError, match=r"^model.routing.capacity_factor=-1"):
        parse(compose(["small"], DEFAULT_EXPERIMENT), ["--model.routing.capacity_factor=-1"]).build()


def test_a_run_that_names_a_moved_class_is_refused_with_its_new_name(command: Command, workplace: Path) -> None:
    assert command("fit", "--config=small", "--run_name=a", "--trainer.max_steps=1")[0] == 0
    config = workplace / "runs/a/config.yaml"
    old, new = (f"lightning_moe.{room}.strategy.FullyShardedStrategy" for room in ("cli", "training"))
    strategy = f"  strategy:\n    class_path: {old}\n    init_args: {{expert_parallel_size: 1}}\n"
    config.write_text(config.read_text().replace("  strategy: auto\n", strategy))
    before = {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()}
    code, _, err = command("fit", "--run_name=a", "--ckpt_path=last", "--trainer.max_steps=2")
    assert code == 2
    message = f"trainer.strategy.class_path='{old}' ({config.resolve()}): this class has moved; write {new} there"
    assert err.splitlines()[-1] == f"error: {message}"
    assert {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()} == before
