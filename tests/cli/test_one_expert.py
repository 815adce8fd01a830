"""One routed expert is a layer like any other: every command takes it."""

from pathlib import Path

import pytest
from helpers.small_run import Command

CKPT = "runs/a/checkpoints/last.ckpt"
RULES = ["dense", "expert_choice", "expert_threshold", "quantile_balancing", "token_choice", "token_choice_loss_free"]


@pytest.mark.parametrize("rule", ["expert_threshold", "token_choice"])
def test_a_run_with_one_expert_draws_its_load(command: Command, workplace: Path, rule: str) -> None:
    code, _, err = fit(command, rule)
    assert code == 0, err
    assert (workplace / "runs/a/figures/load.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_every_command_takes_one_expert(command: Command, rule: str) -> None:
    code, _, err = fit(command, rule)
    assert code == 0, err
    config = ("--config", "small", "--config", f"routing/{rule}", "--model.decoder.num_experts=1")
    for arguments in (
        ("validate", *config),
        ("predict", *config),
        ("generate", "--show_routing", "--max_new_tokens=3"),
        ("analyze", "--output_dir=analysis"),
        ("audit",),
        *([("calibrate", "--output_dir=runs/b")] if rule in ("expert_threshold", "expert_choice") else []),
        ("export", "--output_dir=model"),
    ):
        code, _, err = command(*arguments, "--ckpt_path", CKPT)
        assert code == 0, (arguments, err)
    code, _, err = command("compare", "runs/a", "--output_dir=comparison")
    assert code == 0, err


def fit(command: Command, rule: str) -> tuple[int, str, str]:
    return command(
        "fit", "--config", "small", "--config", f"routing/{rule}", "--run_name=a", "--model.decoder.num_experts=1"
    )
