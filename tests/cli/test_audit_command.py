"""The audit on the command line: a run's checkpoint, its verdict as exit code, refused input."""

from pathlib import Path

import pytest
import torch
from helpers.small_run import Command, tokenizer_of


@pytest.fixture
def ckpt(command: Command) -> str:
    code, _, err = command("fit", "--config", "small", "--run_name=a")
    assert code == 0, err
    return "runs/a/checkpoints/last.ckpt"


def test_the_exit_code_is_the_verdict(command: Command, ckpt: str) -> None:
    code, out, err = command("audit", "--ckpt_path", ckpt)
    assert code == 0, err
    assert "ExpertThreshold, phase causal, 8 sequences of 16 tokens" in out
    assert "\nverdict: causal." in out
    assert out.splitlines()[-1].startswith("not covered: phases warmup and train; ")
    code, out, _ = command("audit", "--ckpt_path", ckpt, "--phase=warmup")
    assert code == 1
    assert "verdict: leaks." in out
    assert "future token: first in layer_01" in out


def test_no_verdict_has_an_exit_code_of_its_own(command: Command, ckpt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a limit of ties that no checkpoint meets."""
    monkeypatch.setattr("lightning_moe.audit.findings.MOST_TIES", -1.0)
    code, out, _ = command("audit", "--ckpt_path", ckpt)
    assert code == 5
    assert "verdict: not judged." in out


def test_a_checkpoint_elsewhere_takes_text_and_tokenizer(command: Command, ckpt: str, workplace: Path) -> None:
    (workplace / "alone.ckpt").write_bytes(Path(ckpt).read_bytes())
    code, _, err = command("audit", "--ckpt_path=alone.ckpt")
    assert code == 2
    assert "give --text." in err
    (workplace / "text.txt").write_text("line 1 of file 2 says 3 in words\n" * 50)
    tokenizer = tokenizer_of(ckpt)
    arguments = ("--ckpt_path=alone.ckpt", "--tokenizer", tokenizer, "--sequence_length=8", "--batch_size=3")
    code, out, err = command("audit", *arguments, "--text=text.txt")
    assert code == 0, err
    assert "3 sequences of 8 tokens" in out
    code, _, err = command("audit", *arguments)
    assert code == 2
    assert "it encodes --text" in err


def test_bad_input_is_refused(command: Command, ckpt: str, workplace: Path) -> None:
    (workplace / "short.txt").write_text("too short")
    (workplace / "other.ckpt").write_bytes(b"no checkpoint")
    torch.save({"state_dict": {}}, workplace / "foreign.ckpt")
    for arguments, message in (
        (("--ckpt_path=gone.ckpt",), "no such file"),
        (("--ckpt_path=other.ckpt",), "not a complete checkpoint"),
        (("--ckpt_path=foreign.ckpt",), "not a checkpoint of this program"),
        ((f"--ckpt_path={ckpt}", "--text=gone.txt"), "--text gone.txt: "),
        ((f"--ckpt_path={ckpt}", "--text=short.txt"), "short.txt has "),
        ((f"--ckpt_path={ckpt}", "--sequence_length=17"), "max_sequence_length is 16"),
        ((f"--ckpt_path={ckpt}", "--batch_size=1"), "must be at least 2"),
        ((f"--ckpt_path={ckpt}", "--device=nowhere"), "--device nowhere: "),
        ((f"--ckpt_path={ckpt}", "--phase=test"), "invalid choice: 'test'"),
        ((), "--ckpt_path"),
    ):
        code, out, err = command("audit", *arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert message in err


def test_the_text_of_another_tokenizer_is_refused(command: Command, ckpt: str, workplace: Path) -> None:
    content = torch.load(ckpt, weights_only=True)
    content["TextDataModule"]["data"]["tokenizer"] = "0123456789abcdef"
    torch.save(content, ckpt)
    code, _, err = command("audit", "--ckpt_path", ckpt)
    assert code == 2
    assert "but was trained with 0123456789abcdef" in err
