"""Preparing in shards: the same bytes for any number of workers, and whatever is killed when."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_corpus import datamodule, ready, write_corpus

from lightning_moe.data import LocalFiles, TokenizerConfig
from lightning_moe.data.prepare import prepare
from lightning_moe.data.split import SPLITS
from lightning_moe.data.store_writer import ShardWriter
from lightning_moe.data.token_store import TokenStore
from lightning_moe.errors import UserError

CONFIG = TokenizerConfig(vocab_size=300)
SHARD = 2500
PATIENCE = 300.0
SCRIPT = """
import sys
from pathlib import Path
from lightning_moe.data import LocalFiles, TokenizerConfig, encoding
from lightning_moe.data.prepare import prepare
if __name__ == "__main__":
    prepare(Path(sys.argv[1]), LocalFiles([sys.argv[2]]), TokenizerConfig(vocab_size=300), 0.2, workers=2,
            shard_size=int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_corpus(tmp_path_factory.mktemp("corpus") / "c.jsonl", documents=200)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line + '{"text": ""}\n' * (i % 3) for i, line in enumerate(lines)))
    return path


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In one process, never interrupted."""
    folder = tmp_path_factory.mktemp("reference") / "store"
    prepare(folder, LocalFiles([str(corpus)]), CONFIG, 0.2, shard_size=SHARD)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_do_not_change_what_is_read(corpus: Path, reference: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "one", LocalFiles([str(corpus)]), CONFIG, 0.2)
    one, many = TokenStore(tmp_path / "one"), TokenStore(reference)
    for split in SPLITS:
        assert len(one.shards(split)) == 1
        assert len(many.shards(split)) > 5
        assert many.tokens(split).tolist() == one.tokens(split).tolist()
        assert many.documents(split) == one.documents(split)
        assert many.domain_counts(split) == one.domain_counts(split)
        assert many.text(split) == one.text(split)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    corpus: Path, reference: Path, tmp_path: Path, workers: int
) -> None:
    prepare(tmp_path / "s", LocalFiles([str(corpus)]), CONFIG, 0.2, workers=workers, shard_size=SHARD)
    assert content(tmp_path / "s") == content(reference)


class Stop(BaseException):
    """As sudden as a kill, without a process of its own."""


@pytest.mark.parametrize("shards", [0, 1, 4])
@pytest.mark.parametrize("where", ["write", "close"])
def test_finished_shards_are_kept_and_the_rest_is_the_same(
    corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, where: str
) -> None:
    original: Callable[..., object] = getattr(ShardWriter, where)

    def stop(writer: ShardWriter, *args: object) -> object:
        if writer.number == shards:
            raise Stop
        return original(writer, *args)

    folder = tmp_path / "s"
    monkeypatch.setattr(ShardWriter, where, stop)
    with pytest.raises(Stop):
        prepare(folder, LocalFiles([str(corpus)]), CONFIG, 0.2, shard_size=SHARD)
    monkeypatch.undo()
    kept = {path: path.stat().st_ino for path in folder.with_name("s.tmp").glob("train-*.tokens")}
    assert not folder.exists()
    assert len(list(folder.with_name("s.tmp").glob("shard-*.json"))) == shards
    prepare(folder, LocalFiles([str(corpus)]), CONFIG, 0.2, shard_size=SHARD)
    assert content(folder) == content(reference)
    finished = [inode for path, inode in kept.items() if int(path.name[6:11]) < shards]
    assert finished == [(folder / path.name).stat().st_ino for path in kept if int(path.name[6:11]) < shards]


def test_a_finished_shard_that_was_damaged_is_made_again(
    corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ShardWriter.close
    monkeypatch.setattr(ShardWriter, "close", lambda w: original(w) if w.number < 3 else (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        prepare(tmp_path / "s", LocalFiles([str(corpus)]), CONFIG, 0.2, shard_size=SHARD)
    monkeypatch.undo()
    path = tmp_path / "s.tmp" / "train-00001.tokens"
    path.write_bytes(bytes(path.stat().st_size))
    prepare(tmp_path / "s", LocalFiles([str(corpus)]), CONFIG, 0.2, shard_size=SHARD)
    assert content(tmp_path / "s") == content(reference)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path) -> None:
    """SIGKILL with two workers at work, twice, after a finished shard: no process lives on, and the bytes agree."""
    corpus = write_corpus(tmp_path / "c.jsonl", documents=30_000)
    size, folder, kills = 1_000_000, tmp_path / "s", 0
    while not folder.exists():
        deadline = time.monotonic() + PATIENCE
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder), str(corpus), str(size)], start_new_session=True
        )
        before = len(list(tmp_path.glob("s.tmp/shard-*.json")))
        while process.poll() is None and len(list(tmp_path.glob("s.tmp/shard-*.json"))) <= before:
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                pytest.fail("no shard was finished in time")
            time.sleep(0.02)
        if process.poll() is None and kills < 2:
            process.kill()
            kills += 1
        assert process.wait(PATIENCE) in (0, -signal.SIGKILL)
        while group_lives(process.pid):
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                pytest.fail("a worker outlived its parent")
            time.sleep(0.05)
    assert kills == 2
    prepare(tmp_path / "reference", LocalFiles([str(corpus)]), CONFIG, 0.2, shard_size=size)
    assert content(folder) == content(tmp_path / "reference")


def group_lives(group: int) -> bool:
    """Whether any process of the group is alive (one that has ended and waits for its parent is not)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, found = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(found) == group and state not in "ZX":
            return True
    return False


@pytest.mark.slow
def test_a_killed_worker_is_reported(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_moe.data import encoding

    monkeypatch.setattr(encoding, "_encode_here", kill_self)
    with pytest.raises(UserError, match=r"worker process was killed.*--workers=1.*kept in .*s\.tmp"):
        prepare(tmp_path / "s", LocalFiles([str(corpus)]), CONFIG, 0.2, workers=1, shard_size=SHARD)


def kill_self(documents: object) -> None:
    assert multiprocessing.parent_process() is not None
    os.kill(os.getpid(), signal.SIGKILL)


def test_training_on_shards_is_training_on_one_file(tmp_path: Path) -> None:
    alone, sharded = datamodule(tmp_path), datamodule(tmp_path, cache_dir=str(tmp_path / "shards"))
    sharded.prepare(shard_size=300)
    ready(alone)
    ready(sharded)
    assert len(sharded.store.shards("train")) > 5
    assert sharded.fingerprint == alone.fingerprint
    pairs = zip(sharded.train_dataloader(), alone.train_dataloader(), range(30), strict=False)
    assert all(a["labels"].tolist() == b["labels"].tolist() for a, b, _ in pairs)


def test_the_manifest_says_what_is_there(reference: Path, corpus: Path) -> None:
    manifest = json.loads((reference / "manifest.json").read_text())
    assert manifest["corpus"] == LocalFiles([str(corpus)]).fingerprint_fields()
    assert manifest["tokenizer"]["vocab_size"] == 300
    assert {*manifest["files"], "manifest.json"} == {path.name for path in reference.iterdir()}
    for shard in manifest["splits"]["train"]["shards"]:
        assert manifest["files"][shard["tokens_file"]]["size"] == 2 * shard["tokens"]
