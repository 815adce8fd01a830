"""Devices, pipes, sockets and folders where files are expected: nothing waits, nothing reads for ever."""

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.bad_content import EVERY, no_longer_than
from helpers.small_run import Command

from lightning_moe.errors import UserError
from lightning_moe.file_schema import read_bytes, read_json, read_text

KINDS = ("/dev/full", "/dev/zero", "/dev/urandom", "pipe", "socket", "folder", "loop", "missing")


@pytest.fixture
def special(tmp_path: Path) -> Iterator[dict[str, Path]]:
    paths = {kind: Path(kind) if kind.startswith("/") else tmp_path / f"special {kind}" for kind in KINDS}
    os.mkfifo(paths["pipe"])
    paths["folder"].mkdir()
    paths["loop"].symlink_to(paths["loop"])
    with socket.socket(socket.AF_UNIX) as opened:
        here = Path.cwd()
        os.chdir(tmp_path)  # the names of sockets are short
        opened.bind(paths["socket"].name)
        os.chdir(here)
        yield paths


def test_the_helper_names_what_it_found(special: dict[str, Path]) -> None:
    for kind, words in (
        ("pipe", "a named pipe"),
        ("/dev/zero", "a device"),
        ("socket", "a socket"),
        ("folder", "a folder"),
    ):
        for read in (read_bytes, read_text, lambda path: read_json(path, dict)):
            with (
                no_longer_than(10),
                pytest.raises(UserError, match=f"{special[kind]}: is {words}; must be a regular file"),
            ):
                read(special[kind])


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(5 * 10**9)
    with pytest.raises(UserError, match=r"large\.json: has 5000000000 bytes; must have at most 268435456"):
        read_json(tmp_path / "large.json", dict)


FLAGS = (
    ("generate", "--ckpt_path={ckpt}", "--prompt_file={}"),
    ("generate", "--ckpt_path={ckpt}", "--tokenizer={}"),
    ("generate", "--ckpt_path={}"),
    ("analyze", "--ckpt_path={ckpt}", "--text={}", "--no_mlflow", "--output_dir=out"),
    ("analyze", "--ckpt_path={}", "--no_mlflow", "--output_dir=out"),
    ("audit", "--ckpt_path={ckpt}", "--text={}"),
    ("audit", "--ckpt_path={}"),
    ("calibrate", "--ckpt_path={ckpt}", "--text={}", "--output_dir=out"),
    ("export", "--ckpt_path={}", "--output=out"),
    ("convert", "--ckpt_path={}", "--output=out.safetensors"),
    ("compare", "{}", "--no_mlflow", "--output_dir=out"),
    ("fit", "--config={}"),
    ("fit", "--config=small", "--ckpt_path={}"),
    ("fit", "--config=small", "--model.init_from={}"),
    ("fit", "--config=small", "--data.tokenizer.file={}"),
    ("fit", "--config=small", "--data.corpus.init_args.paths=[{}]"),
    ("prepare", "--config=small", "--data.corpus.init_args.paths=[{}]"),
    ("validate", "--ckpt_path={}"),
    ("sweep", "{}"),
    ("study", "{}"),
)


@EVERY
def test_every_flag_that_names_a_file(every: bool, special: dict[str, Path], command: Command, workplace: Path) -> None:
    """Each flag with each kind of file, or with one kind."""
    assert command("fit", "--config=small", "--run_name=a", "--trainer.max_steps=2")[0] == 0
    ckpt, found = workplace / "runs/a/checkpoints/last.ckpt", []
    kinds = list(special.items())
    for number, line in enumerate(FLAGS):
        for kind, path in kinds if every else [kinds[number % len(kinds)]]:
            filled = [part.format(path, ckpt=ckpt) for part in line]
            try:
                with no_longer_than(120):
                    code, _, err = command(*filled)
            except BaseException as error:
                found.append(f"{filled}: {type(error).__name__}: {error}"[:300])
                continue
            errors = [text for text in err.splitlines() if text.startswith("error:") or "error: argument" in text]
            if code != 2 or len(errors) != 1 or str(path) not in errors[0]:
                found.append(f"{filled} ({kind}): {code}: {err[-200:]}")
    assert found == []
    assert sorted(path.name for path in (workplace / "runs").iterdir()) == ["a"]
    assert not (workplace / "out").exists()


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_files_of_a_run_and_of_its_data(
    kind: str, special: dict[str, Path], command: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_MOE_CACHE", str(workplace / "cache"))
    assert command("fit", "--config=small", "--run_name=a", "--trainer.max_steps=2")[0] == 0
    ckpt = f"--ckpt_path={workplace}/runs/a/checkpoints/last.ckpt"
    assert command("export", ckpt, "--output=e")[0] == 0
    (data,) = (path.parent for path in (workplace / "cache").glob("*/manifest.json"))
    lines = {
        "runs/a/config.yaml": [("compare", "runs/a", "--no_mlflow", "--output_dir=out"), ("validate", ckpt)],
        "runs/a/summary.json": [("compare", "runs/a", "--no_mlflow", "--output_dir=out")],
        "runs/a/metrics.jsonl": [("analyze", ckpt, "--no_mlflow", "--output_dir=out")],
        "runs/a/tracking.jsonl": [("compare", "runs/a", "--no_mlflow", "--output_dir=out")],
        "runs/a/mlflow_run.json": [("validate", ckpt)],
        "runs/a/checkpoints/last.ckpt": [("generate", ckpt), ("fit", "--run_name=a", "--ckpt_path=last")],
        "e/config.json": [("generate", "--ckpt_path=e")],
        "e/model.safetensors": [("generate", "--ckpt_path=e")],
        "e/tokenizer.json": [("generate", "--ckpt_path=e")],
        f"cache/{data.name}/manifest.json": [("validate", ckpt)],
        f"cache/{data.name}/checked.json": [("validate", ckpt)],
        f"cache/{data.name}/tokenizer.json": [("validate", ckpt)],
        f"cache/{data.name}/train-00000.tokens": [("validate", ckpt)],
    }
    found = []
    for name, commands in lines.items():
        file = workplace / name
        kept = file.read_bytes() if file.exists() else None
        file.unlink(missing_ok=True)
        file.symlink_to(special[kind])
        for line in commands:
            try:
                with no_longer_than(120):
                    code, _, err = command(*line)
            except BaseException as error:
                found.append(f"{name}: {line}: {type(error).__name__}: {error}"[:300])
                continue
            if code not in (0, 2) or err.count("error:") > 1 or "Traceback" in err:
                found.append(f"{name}: {line}: {code}: {err[-300:]}")
        file.unlink()
        if kept is not None:
            file.write_bytes(kept)
        shutil.rmtree(workplace / "out", ignore_errors=True)
    assert found == []
