"""A rule from the user's own file (docs/examples/third_party_rule): in a trainer, and in every command."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.foreign_module import ForeignModule, global_batches, make_trainer, micro_batches

from lightning_moe.callbacks import FiniteGuard, LoadBalance, RoutingStateUpdate, ThresholdWarmup
from lightning_moe.errors import UserError
from lightning_moe.module import LanguageModel
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
    module = ForeignModule(top_p, num_experts_per_token=2)
    callbacks = [ThresholdWarmup(steps=3), FiniteGuard(), RoutingStateUpdate(), LoadBalance()]
    make_trainer(callbacks, accumulate_grad_batches=2).fit(module, micro_batches(global_batches(30), 2))
    for layer in module.layers():
        assert layer.record.selection.mask.float().sum(-1).mean().item() == pytest.approx(2, abs=0.3)
        assert layer.state["probability"].item() > 0.6  # 0.5 at first


TINY = (
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
)
TRAINING = (*TINY, "--tracking.enabled=false", "--trainer.val_check_interval=3")


@dataclass(frozen=True)
class Workplace:
    """A user's folder: the example's files, and text to train on."""

    folder: Path

    def run(self, *arguments: str, code: int = 0) -> str:
        """Run ``python -m lightning_moe``; return what it printed, on standard error if it should fail.

        Args:
            arguments: the command and its options.
            code: the exit code that is expected. Of 2, one line ``error: …`` is all that may be printed.
        """
        done = self.process("lightning_moe", *arguments, cwd=self.folder)
        assert done.returncode == code, done.stdout + done.stderr
        if code != 2:
            return done.stdout
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        return done.stderr

    def process(self, module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(self.folder), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    def checkpoint(self, run_name: str) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(self.folder / last(run_name), weights_only=True)
        return found


def last(run_name: str) -> str:
    return f"runs/{run_name}/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """With a checkpoint of each of the example's rules."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("my_rules.py", "my_rule.yaml"):
        shutil.copy(EXAMPLE / name, folder)
    (folder / "text").mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:30]:
        shutil.copy(path, folder / "text")
    user = Workplace(folder)
    user.run("fit", "--config=my_rule.yaml", *TRAINING, "--run_name=top_p", "--trainer.max_steps=6")
    floored = ("--model.routing=my_rules.FlooredThreshold", "--model.routing.init_args.floor=0.25")
    steps = ("--threshold_warmup.steps=2", "--trainer.max_steps=3")
    user.run("fit", *TRAINING, *floored, *steps, "--run_name=floored")
    return user


@pytest.mark.slow
def test_training_goes_on_and_validates(workplace: Workplace) -> None:
    options = ("--config=my_rule.yaml", *TRAINING, "--run_name=top_p", "--trainer.max_steps=9", "--ckpt_path=last")
    workplace.run("fit", *options)
    checkpoint = workplace.checkpoint("top_p")
    assert checkpoint["global_step"] == 9
    assert checkpoint["hyper_parameters"]["routing"] == {
        "class_path": "my_rules.TopP",
        "init_args": {"step_size": 0.02},
    }
    p = checkpoint["state_dict"]["decoder.blocks.1.moe.state.probability"].item()
    assert p == pytest.approx(2 / 16 + 9 * 0.02)  # too few experts at first: nine steps up, six before the resume
    workplace.run("validate", "--config=my_rule.yaml", *TINY, f"--ckpt_path={last('top_p')}")


@pytest.mark.slow
@pytest.mark.parametrize("run_name", ["top_p", "floored"])
def test_both_are_causal_at_inference(workplace: Workplace, run_name: str) -> None:
    printed = workplace.run("audit", f"--ckpt_path={last(run_name)}", "--batch_size=2", "--sequence_length=8")
    assert "verdict: causal." in printed


@pytest.mark.slow
def test_the_thresholds_of_the_derived_rule_are_calibrated_and_the_other_rule_says_that_it_has_none(
    workplace: Workplace,
) -> None:
    printed = workplace.run(
        "calibrate", f"--ckpt_path={last('floored')}", "--output_dir=runs/calibrated", "--max_tokens=2048"
    )
    assert "FlooredThreshold -> FlooredThreshold" in printed
    before, after = workplace.checkpoint("floored"), workplace.checkpoint("calibrated")
    assert after["hyper_parameters"]["routing"]["class_path"] == "my_rules.FlooredThreshold"
    assert after["hyper_parameters"]["routing"]["init_args"]["floor"] == 0.25
    name = "decoder.blocks.1.moe.state.threshold"
    assert not torch.equal(before["state_dict"][name], after["state_dict"][name])
    error = workplace.run("calibrate", f"--ckpt_path={last('top_p')}", "--output_dir=runs/nothing", code=2)
    assert "model.routing=TopP: there is nothing to calibrate" in error
    assert not (workplace.folder / "runs/nothing").exists()


@pytest.mark.slow
def test_both_are_analysed_side_by_side(workplace: Workplace) -> None:
    both = (f"--ckpt_path=top_p={last('top_p')}", f"--ckpt_path=floored={last('floored')}")
    few = ("--max_tokens=512", "--compare_num_experts_per_token=1", "--pools=1")
    workplace.run("analyze", *both, *few, "--output_dir=analysis", "--no_mlflow")
    document = json.loads((workplace.folder / "analysis/analysis.json").read_text())
    assert {row["checkpoint"] for row in document["pools"]["summary"]} == {"floored"}  # the other has no thresholds
    without = "top_p: no thresholds to compare a cutoff with; its usage is shown."
    assert document["cutoff_vs_usage"]["missing"] == [without]
    assert any("TopP was trained for 2 and cannot route" in line for line in document["compute"]["missing"])


@pytest.mark.slow
def test_the_derived_rule_is_exported_and_the_other_rule_says_why_it_is_not(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    workplace.run("export", f"--ckpt_path={last('floored')}", "--output=exported")
    exported = transformers.AutoModelForCausalLM.from_pretrained(
        workplace.folder / "exported", trust_remote_code=True
    ).eval()
    monkeypatch.syspath_prepend(EXAMPLE)
    ours = LanguageModel.load_from_checkpoint(workplace.folder / last("floored")).eval()
    ids = torch.randint(0, 512, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, ours(ids), rtol=1e-5, atol=1e-5)
    assert next(ours.decoder.moe_layers()).state["threshold"].min() >= 0.25
    error = workplace.run("export", f"--ckpt_path={last('top_p')}", "--output=not_exported", code=2)
    assert "model.routing=TopP: it declares no causal_choice" in error
    assert not (workplace.folder / "not_exported").exists()


@pytest.mark.slow
def test_both_are_benchmarked_from_a_checkout(workplace: Workplace) -> None:
    rules = ("my_rules.TopP", "my_rules.FlooredThreshold")
    sizes = ("--hidden_size=32", "--num_tokens=64", "--num_experts=4", "--num_layers=2", "--vocab_size=64")
    done = workplace.process(
        "benchmarks", "--compare", "step", "--routing", *rules, *sizes, "--rounds=2", cwd=EXAMPLE.parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert all(f"  {rule}  " in done.stdout for rule in rules)
