"""Generation on the command line: prompts, what is printed where, the routing shown, refused input."""

import re
from pathlib import Path

import pytest
import torch
from helpers.small_run import Command, tokenizer_of

from lightning_moe.cli.routing_colors import RAMP, Palette


@pytest.fixture
def ckpt(command: Command) -> str:
    code, _, err = command("fit", "--config", "small", "--run_name=a")
    assert code == 0, err
    return "runs/a/checkpoints/last.ckpt"


def test_prompts_are_continued_and_refused(command: Command, ckpt: str, workplace: Path) -> None:
    code, out, err = command("generate", "--ckpt_path", ckpt, "--prompt", "line 1", "--max_new_tokens=5")
    assert code == 0, err
    assert out.startswith("line 1")
    # rarely the little trained model ends a document by itself
    assert re.search(r"5 new tokens in .*ended by: length|ended by: end_of_text", err)
    again = command("generate", "--ckpt_path", ckpt, "--prompt", "line 1", "--max_new_tokens=5", "--seed=1")
    assert again[1] == out
    # fewer than asked for by default, where the context of 16 ends
    code, _, err = command("generate", "--ckpt_path", ckpt)
    assert code == 0, err
    assert re.search(r"16 new tokens in|ended by: end_of_text", err)

    (workplace / "prompts.txt").write_text("line 2\n\nwords\n")
    code, out, err = command(
        "generate",
        "--ckpt_path",
        ckpt,
        "--prompt",
        "line 1",
        "--prompt_file=prompts.txt",
        "--max_new_tokens=3",
        "--show_routing",
    )
    assert code == 0, err
    assert [line for line in out.splitlines() if line.startswith("---")] == [f"--- prompt {n} of 3" for n in (1, 2, 3)]
    plain = re.sub(r"⟨\d+⟩", "", out)
    assert "--- prompt 3 of 3\nwords" in plain
    assert "⟨n⟩ after a token: routed experts of a token, summed over 1 MoE layers (target 1)" in out
    assert re.search(r"9 new tokens in .*ended by: length, length, length|end_of_text", err)
    assert "routed experts per new token" in err

    (workplace / "empty.txt").write_text("\n")
    content = torch.load(ckpt, weights_only=True)
    del content["TextDataModule"]["tokenizer"]  # as one that was written from Python
    torch.save(content, workplace / "alone.ckpt")
    tokenizer = tokenizer_of(ckpt)
    assert command("generate", "--ckpt_path=alone.ckpt", "--tokenizer", tokenizer)[0] == 0
    long = "words and more words and more of them than the context of this model can ever hold"
    (workplace / "long.txt").write_text(f"words\n{long}\n")
    for arguments, message in (
        (("--ckpt_path=gone.ckpt",), "no such file"),
        (("--ckpt_path=alone.ckpt",), "give --tokenizer."),
        (("--ckpt_path", ckpt, "--prompt", long), "do not fit into the model's context of 16: shorten the prompt"),
        (("--ckpt_path", ckpt, "--prompt", "line", "--prompt", long), "prompt 2 has "),
        (("--ckpt_path", ckpt, "--prompt", "a", "--max_new_tokens=16"), "there is room for 15 new tokens after it"),
        (("--ckpt_path", ckpt, "--max_new_tokens=-1"), "argument --max_new_tokens: -1: must be at least 0"),
        (("--ckpt_path", ckpt, "--temperature=-1"), "argument --temperature: -1: must be 0 or more"),
        (("--ckpt_path", ckpt, "--top_p=0"), "argument --top_p: 0: must be above 0"),
        (("--ckpt_path", ckpt, "--stop="), "stop='': an empty string"),
        (("--ckpt_path", ckpt, "--prompt_file=gone.txt"), "--prompt_file gone.txt: "),
        (("--ckpt_path", ckpt, "--prompt_file=long.txt"), "prompt 2 (of --prompt, then --prompt_file long.txt) has "),
        (("--ckpt_path", ckpt, "--prompt_file=empty.txt"), "has no prompt; write one a line"),
        (("--ckpt_path", ckpt, "--device=abacus"), "--device abacus: "),
        ((), "--ckpt_path"),
    ):
        code, out, err = command("generate", *arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert message in err


def test_a_dense_model_has_no_routing_to_show(command: Command, workplace: Path) -> None:
    code, _, err = command(
        "fit", "--config", "small", "--config", "routing/dense", "--run_name=d", "--trainer.max_steps=2"
    )
    assert code == 0, err
    code, out, err = command(
        "generate", "--ckpt_path=runs/d/checkpoints/last.ckpt", "--show_routing", "--max_new_tokens=2"
    )
    assert code == 0, err
    assert out.startswith("dense model: every token takes the same path")
    assert "⟨" not in out


def test_colours_grow_with_the_fanout_and_end_with_the_line() -> None:
    palette = Palette(layers=3, target=3.0, color=True)
    backgrounds = [palette.paint("x", fanout).split("\x1b[48;2;")[1].split("m")[0] for fanout in range(9)]
    assert backgrounds[0] == ";".join(map(str, RAMP[0]))
    assert backgrounds[6] == backgrounds[8] == ";".join(map(str, RAMP[-1]))
    assert len(set(backgrounds[:7])) == 7
    assert palette.paint("):\n\n", 1).endswith("\x1b[0m\n\n")
    assert "↵" in palette.paint("\n", 1)
    assert palette.paint("", 1) == ""
    assert palette.legend().count("\x1b[0m") == 7
    assert "6+" in palette.legend()
    assert Palette(3, 3.0, color=False).paint("):\n", 7) == "):⟨7⟩\n"


def test_the_dial_changes_how_many_experts_a_token_takes(command: Command, ckpt: str) -> None:
    arguments = (
        "generate",
        "--ckpt_path",
        ckpt,
        "--prompt",
        "line 1 of file 2",
        "--max_new_tokens=4",
        "--show_routing",
    )
    counts = []
    for flags in ((), ("--inference_num_experts_per_token=2",)):
        code, out, err = command(*arguments, *flags)
        assert code == 0, err
        assert f"(target {len(flags) + 1})" in out
        counts.append(sum(map(int, re.findall(r"⟨(\d+)⟩", out))))
    assert counts[1] > counts[0]
    code, _, err = command(*arguments, "--inference_num_experts_per_token=9")
    assert code == 2
    assert "at most 4" in err
