"""``generate --save_routes`` and ``replay`` on the command line: real runs, in two precisions; refused input."""

import re
from pathlib import Path

import pytest
from helpers.small_run import Command
from safetensors import safe_open

from lightning_moe.replay import read_routes

CKPT = "runs/a/checkpoints/last.ckpt"


@pytest.fixture(params=["expert_threshold", "token_choice"])
def run(command: Command, request: pytest.FixtureRequest) -> str:
    code, _, err = command("fit", "--config", "small", "--config", f"routing/{request.param}", "--run_name=a")
    assert code == 0, err
    return str(request.param)


def number(out: str, row: str, column: int) -> float:
    """A number of a table's row, counted from its end."""
    line = next(line for line in out.splitlines() if line.startswith(row))
    return float(re.split(r"\s{2,}", line)[column].split(" ")[0].rstrip("%"))


def test_a_generation_is_saved_and_replayed(command: Command, run: str, workplace: Path) -> None:
    prompts = ("--prompt", "line 1", "--prompt", "words", "--prompt", "", "--max_new_tokens=5", "--batch_size=2")
    code, plain, err = command("generate", "--ckpt_path", CKPT, *prompts)
    assert code == 0, err
    for name, flags in (("a", ()), ("b", ("--precision=bf16-mixed", "--show_routing")), ("c", ("--temperature=0",))):
        code, out, err = command(
            "generate", "--ckpt_path", CKPT, *prompts, "--save_routes", f"{name}.safetensors", *flags
        )
        assert code == 0, err
        assert name != "a" or out == plain
    routes = read_routes(Path("a.safetensors"))
    assert routes.tokens.shape[0] == 3
    assert routes.made.layers == ["layer_01"]
    assert (routes.made.precision, read_routes(Path("b.safetensors")).made.precision) == ("32-true", "bf16-mixed")
    assert len(routes.made.weights) == 32
    with safe_open("a.safetensors", "pt") as file:
        assert file.metadata().keys() == {"routes"}

    code, out, err = command("replay", "--ckpt_path", CKPT, "--routes=a.safetensors", "--batch_size=2")
    assert code == 0, err
    assert f"{int(routes.lengths.sum())} tokens, {int(routes.new.sum())} of them new, generated in 32-true" in out
    assert number(out, "tokens with other experts", -1) == 0
    assert abs(number(out, "KL(generation", -1)) < 1e-9
    code, out, err = command("replay", "--ckpt_path", CKPT, "--routes=b.safetensors")
    assert code == 0, err
    assert "generated in bf16-mixed, scored in 32-true" in out
    assert number(out, "tokens with other experts", -1) == 0
    assert number(out, "KL(generation", -1) > 1e-9
    code, out, err = command("replay", "--ckpt_path", CKPT, "--routes=c.safetensors", "--precision=bf16-true")
    assert code == 0, err
    assert "scored in bf16-true" in out
    assert "No estimate of the KL" in out


def test_the_compute_dial_is_set_again(command: Command, run: str) -> None:
    dial = "--inference_num_experts_per_token=2"
    arguments = ("--ckpt_path", CKPT, "--prompt", "line 1 of file 2", "--max_new_tokens=4")
    code, _, err = command("generate", *arguments, dial, "--save_routes=routes")
    assert code == 0, err
    code, out, err = command("replay", "--ckpt_path", CKPT, "--routes=routes")
    assert code == 0, err
    assert number(out, "tokens with other experts", -2) == 0


def test_what_does_not_fit_is_refused(command: Command, run: str, workplace: Path) -> None:
    good = ("--ckpt_path", CKPT, "--routes=routes")
    assert command("generate", "--ckpt_path", CKPT, "--max_new_tokens=3", "--save_routes=routes")[0] == 0
    assert command("generate", "--ckpt_path", CKPT, "--max_new_tokens=0", "--save_routes=none")[0] == 0
    for name, flags in (
        ("other", ("--trainer.max_steps=5",)),
        ("shape", ("--model.decoder.num_experts=6", "--trainer.max_steps=2")),
        ("dense", ("--config", "routing/dense", "--trainer.max_steps=2")),
    ):
        assert command("fit", "--config", "small", *flags, "--run_name", name)[0] == 0
    whole = Path("routes").read_bytes()
    Path("cut").write_bytes(whole[: len(whole) // 2])
    Path("text").write_text("no tensors")
    for arguments, message in (
        (("--ckpt_path", CKPT, "--routes=gone"), "gone: no such file"),
        (("--ckpt_path", CKPT, "--routes=cut"), "cut: not a whole file of routes"),
        (("--ckpt_path", CKPT, "--routes=text"), "text: not a whole file of routes"),
        (("--ckpt_path", CKPT, "--routes=none"), "--routes none: has no new token to score"),
        (("--ckpt_path=runs/other/checkpoints/last.ckpt", "--routes=routes"), "was generated with other weights ("),
        (("--ckpt_path=runs/shape/checkpoints/last.ckpt", "--routes=routes"), "experts per layer: 4; this model has 6"),
        (("--ckpt_path=runs/dense/checkpoints/last.ckpt", "--routes=routes"), "this model has none: it is dense"),
        ((*good, "--device=abacus"), "--device abacus: "),
        ((*good, "--precision=16"), "argument --precision: invalid choice: '16'"),
        (("--ckpt_path", CKPT), "--routes"),
    ):
        code, out, err = command("replay", *arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert message in err
    for arguments, message in (
        (("--save_routes=routes",), "--save_routes routes: exists, and nothing is overwritten"),
        (("--save_routes=text/routes",), "--save_routes text"),
        (("--save_routes=new", "--max_new_tokens=16"), "there is room for 15 new tokens after it"),
        (("--save_routes=new", "--ckpt_path=runs/dense/checkpoints/last.ckpt"), "the dense model has no routes"),
    ):
        code, out, err = command("generate", "--ckpt_path", CKPT, *arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert message in err
    assert not Path("new").exists()
    assert Path("routes").read_bytes() == whole
