"""A rule from the user's own file (docs/examples/third_party_rule): in a trainer, on the command line, reloaded."""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from helpers.stranger import Stranger, global_batches, make_trainer, micro_batches

from lightning_moe.callbacks import FiniteGuard, LoadBalance, RoutingStateUpdate, ThresholdWarmup
from lightning_moe.errors import UserError
from lightning_moe.routing import Phase, RoutingRule, RoutingState, rule_from_config

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "third_party_rule"


@pytest.fixture
def top_p(monkeypatch: pytest.MonkeyPatch) -> RoutingRule:
    monkeypatch.syspath_prepend(EXAMPLE)
    rule = rule_from_config({"class_path": "my_rules.TopP", "init_args": {"step_size": 0.05}})
    assert rule is not None
    return rule


def test_the_configuration_is_enough_to_build_it_again(top_p: RoutingRule) -> None:
    assert rule_from_config(json.loads(json.dumps(top_p.to_config()))) == top_p


def test_a_file_that_is_not_on_the_path_is_named() -> None:
    with pytest.raises(UserError, match=r"'my_rules_elsewhere\.TopP' cannot be imported"):
        rule_from_config({"class_path": "my_rules_elsewhere.TopP"})


def test_the_example_takes_the_fewest_experts_that_reach_p(top_p: RoutingRule) -> None:
    state = RoutingState(top_p, 4, 1)
    state["probability"].fill_(0.7)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 3, 4)[..., torch.tensor([3, 0, 2, 1])]
    mask = top_p.select(logits, state, Phase.CAUSAL).mask
    assert mask.tolist() == [[[False, True, False, True]] * 3]


def test_it_trains_with_every_callback_and_reaches_its_target(top_p: RoutingRule) -> None:
    """p moves until the global batch's mean number of experts per token is about the configured one."""
    module = Stranger(top_p, num_experts_per_token=2)
    callbacks = [ThresholdWarmup(steps=3), FiniteGuard(), RoutingStateUpdate(), LoadBalance()]
    make_trainer(callbacks, accumulate_grad_batches=2).fit(module, micro_batches(global_batches(30), 2))
    for layer in module.layers():
        assert layer.record.selection.mask.float().sum(-1).mean().item() == pytest.approx(2, abs=0.3)
        assert layer.state["probability"].item() > 0.6  # 0.5 at first


def lightning_moe(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m lightning_moe`` in a user's folder, with a tiny model on 30 files of the standard library."""
    tiny = [
        "--config=my_rule.yaml",
        "--data.corpus=LocalFiles",
        "--data.corpus.init_args.paths=[text]",
        "--data.cache_dir=cache",
        "--data.tokenizer.vocab_size=512",
        "--data.sequence_length=32",
        "--data.validation_fraction=0.2",
        "--model.decoder.hidden_size=32",
        "--model.decoder.num_attention_heads=2",
        "--model.decoder.num_layers=2",
        "--model.decoder.num_experts_per_token=2",
        "--model.schedule.adamw_warmup_steps=2",
        "--trainer.limit_val_batches=4",
        "--trainer.enable_progress_bar=false",
    ]
    command = [sys.executable, "-m", "lightning_moe", arguments[0], *tiny, *arguments[1:]]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_it_is_named_in_yaml_and_survives_fit_resume_and_validate(tmp_path: Path) -> None:
    for name in ("my_rules.py", "my_rule.yaml"):
        shutil.copy(EXAMPLE / name, tmp_path)
    (tmp_path / "text").mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:30]:
        shutil.copy(path, tmp_path / "text")
    untracked = ("--tracking.enabled=false", "--run_name=mine")
    for arguments in (
        ("fit", *untracked, "--trainer.max_steps=6", "--trainer.val_check_interval=3"),
        ("fit", *untracked, "--trainer.max_steps=9", "--trainer.val_check_interval=3", "--ckpt_path=last"),
        ("validate", "--ckpt_path=runs/mine/checkpoints/last.ckpt"),
    ):
        done = lightning_moe(tmp_path, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    checkpoint = torch.load(tmp_path / "runs/mine/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 9
    assert checkpoint["hyper_parameters"]["routing"]["class_path"] == "my_rules.TopP"
    p = checkpoint["state_dict"]["decoder.blocks.1.moe.state.probability"].item()
    assert p == pytest.approx(
        2 / 16 + 9 * 0.02
    )  # too few experts at first: nine steps up, six of them before the resume
