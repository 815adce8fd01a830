"""`prepare` as typed: fit finds what it made, damage ends it with the file's name, and so does what it cannot read."""

import json
from pathlib import Path

import pytest
from helpers.small_run import Command

from lightning_moe.data.store_writer import ShardWriter


@pytest.fixture
def cache(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_MOE_CACHE", str(workplace / "cache"))
    return workplace / "cache"


def store_in(cache: Path) -> Path:
    (manifest,) = cache.glob("*/manifest.json")
    return manifest.parent


@pytest.mark.slow
def test_fit_finds_what_prepare_made(command: Command, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("--config=small.yaml", "--model.decoder.num_layers=2")
    code, out, err = command("prepare", *line, "--workers=2", "--shard_size=5000")
    assert code == 0, err
    assert "prepared, and every byte checked" in out
    folder = store_in(cache)
    assert str(folder) in out
    counts = json.loads((folder / "manifest.json").read_text())["splits"]["train"]
    assert f"{sum(d['tokens'] for d in counts['domains'].values()):,} tokens" in out
    assert f"{len(counts['shards'])} shards" in out
    assert len(counts["shards"]) > 5

    def no_more(*args: object) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setattr(ShardWriter, "write", no_more)
    code, out, err = command("fit", *line, "--run_name=a")
    assert code == 0, err
    assert "Preparing" not in out + err
    code, out, err = command("prepare", *line)
    assert (code, out[:6]) == (0, "found,"), err
    assert not (cache.parent / "runs" / "prepare").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [("cut", "it ends at offset 100"), ("token", "holds token 65535 at offset 40, but the vocabulary has 300")],
)
def test_damage_is_named_before_training(command: Command, cache: Path, damage: str, message: str) -> None:
    line = ("--config=small.yaml", "--workers=1")
    code, _, err = command("prepare", *line)
    assert code == 0, err
    path = store_in(cache) / "train-00000.tokens"
    content = path.read_bytes()
    path.write_bytes(content[:100] if damage == "cut" else content[:40] + b"\xff\xff" + content[42:])
    for name in ("prepare", "fit"):
        code, _, err = command(name, *(line if name == "prepare" else line[:1]))
        assert code == 2
        assert f"{path} " in err
        assert message in err
    assert not list((cache.parent / "runs").glob("*/checkpoints/*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers=0"], "workers"),
        (["--shard_size=none"], "shard_size"),
        (["--data.corpus.paths=[gone]"], "no file matches"),
        (["--data.tokenizer.vocab_size=3"], "at least 257"),
        (["--data.corpora=x"], "data.corpora"),
    ],
)
def test_bad_input_is_one_line(command: Command, cache: Path, flags: list[str], message: str) -> None:
    code, _, err = command("prepare", "--config=small.yaml", *flags)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert not list(cache.glob("*/manifest.json"))
