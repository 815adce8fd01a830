"""A run, its checkpoints and what is made of them need no cache and no corpus to be used: the tokenizer is inside."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.small_run import Command
from safetensors import safe_open

from lightning_moe.data import Tokenizer

SMALL = ("--config", "small", "--run_name=a", "--trainer.max_steps=2")
TEXT = "words that no corpus of the tests has: zyzzyva\n" * 40


@pytest.fixture
def elsewhere(command: Command, workplace: Path, tmp_path_factory: pytest.TempPathFactory,
              monkeypatch: pytest.MonkeyPatch) -> Path:  # fmt: skip
    """A run that was copied to a machine with an empty cache, where its corpus is not."""
    corpus = workplace / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.txt").write_text(f"The {number}th text has words, and {number * 7919} is a number. " * 9)
    assert command("fit", *SMALL, "--data.corpus.init_args.paths=[corpus]")[0] == 0
    place = tmp_path_factory.mktemp("elsewhere")
    shutil.move(workplace / "runs/a", place / "a")
    shutil.rmtree(corpus)
    monkeypatch.setenv("LIGHTNING_MOE_CACHE", str(place / "cache"))
    (workplace / "text.txt").write_text(TEXT)
    return place / "a"


def test_run_and_checkpoint_hold_the_tokenizer(elsewhere: Path) -> None:
    content = torch.load(elsewhere / "checkpoints/last.ckpt", weights_only=True)["TextDataModule"]
    of_checkpoint = Tokenizer.from_text(content["tokenizer"], "checkpoint")
    assert of_checkpoint.fingerprint == content["data"]["tokenizer"]
    assert Tokenizer.load(elsewhere / "tokenizer.json").fingerprint == of_checkpoint.fingerprint


def test_every_command_takes_it_from_the_checkpoint(elsewhere: Path, command: Command, workplace: Path) -> None:
    ckpt = f"--ckpt_path={elsewhere}/checkpoints/last.ckpt"
    commands = {
        "generate": ("--prompt=The", "--max_new_tokens=3"),
        "export": ("--output_dir=exported",),
        "calibrate": ("--text=text.txt", "--output_dir=calibrated"),
        "analyze": ("--text=text.txt", "--output_dir=analysis", "--no_mlflow"),
        "audit": ("--text=text.txt", "--batch_size=2"),
        "convert": ("--output=weights.safetensors",),
    }
    for name, options in commands.items():
        code, _, err = command(name, ckpt, *options)
        assert code == 0, (name, err)
    with safe_open("weights.safetensors", "pt") as file:
        assert "tokenizer" in file.metadata()
    assert command("generate", "--ckpt_path=weights.safetensors", "--prompt=The", "--max_new_tokens=3")[0] == 0
    assert command("generate", "--ckpt_path=exported", "--prompt=The", "--max_new_tokens=3")[0] == 0


def test_without_text_the_message_asks_for_text(elsewhere: Path, command: Command) -> None:
    code, _, err = command("audit", f"--ckpt_path={elsewhere}/checkpoints/last.ckpt")
    assert code == 2
    assert "corpus" in err


def test_a_corpus_that_grew_is_scored_with_the_tokenizer_of_the_run(command: Command, workplace: Path) -> None:
    corpus = workplace / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.txt").write_text(f"The {number}th text has words, and {number * 7919} is a number. " * 9)
    assert command("fit", *SMALL, "--data.corpus.init_args.paths=[corpus]")[0] == 0
    (corpus / "more.txt").write_text("quite other words, of which a tokenizer would make other tokens; " * 90)

    code, out, err = command("validate", "--run_name=a", "--ckpt_path=last")
    assert code == 0, err
    assert "loss" in out
    assert command("predict", "--run_name=a", "--ckpt_path=last")[0] == 0
    # training goes on with the same text only: other windows would be another experiment
    code, _, err = command("fit", "--run_name=a", "--ckpt_path=last", "--trainer.max_steps=3")
    assert code == 2
    assert "was trained on the data" in err


def test_training_goes_on_where_the_cache_is_empty(
    command: Command, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("fit", *SMALL)[0] == 0
    monkeypatch.setenv("LIGHTNING_MOE_CACHE", str(tmp_path / "cache"))
    code, _, err = command("fit", "--run_name=a", "--ckpt_path=last", "--trainer.max_steps=3")
    assert code == 0, err
    assert [path.name for path in (tmp_path / "cache/tokenizers").iterdir()]
