"""Files of prepared data with other content than the program writes: refused in a line, or made anew."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.bad_content import EVERY, one_each, surprises, wrong_contents
from small_corpus import datamodule, ready, write_corpus

from lightning_moe.data import LocalFiles, Tokenizer, TokenizerConfig
from lightning_moe.data.prepare import _finished, prepare
from lightning_moe.data.store_writer import ShardWriter
from lightning_moe.data.token_store import CHECKED, MANIFEST, TOKENIZER, TokenStore

CONFIG = TokenizerConfig(vocab_size=300)
SHARD = 2500


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> LocalFiles:
    return LocalFiles([str(write_corpus(tmp_path_factory.mktemp("corpus") / "c.jsonl", documents=60))])


@pytest.fixture(scope="module")
def whole(corpus: LocalFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "store"
    prepare(folder, corpus, CONFIG, 0.2, shard_size=SHARD)
    return folder


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "store")
    return tmp_path / "store"


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_every_key_of_the_manifest(store: Path) -> None:
    def read(content: Any) -> None:
        (store / MANIFEST).write_text(json.dumps(content))
        opened = TokenStore(store)
        opened.check(everything=True)
        for split in ("train", "validation"):
            opened.counts(split)
            assert len(opened.tokens(split)[:]) == len(opened.tokens(split))
            opened.documents(split)
            opened.text(split)

    content = json.loads((store / MANIFEST).read_text())
    assert surprises(wrong_contents(content), read, str(store)) == []


def test_every_key_of_the_manifest_as_the_data_module_reads_it(tmp_path: Path) -> None:
    folder = ready(datamodule(tmp_path)).directory

    def read(content: Any) -> None:
        (folder / MANIFEST).write_text(json.dumps(content))
        data = ready(datamodule(tmp_path))
        data.describe()
        next(iter(data.train_dataloader()))
        next(iter(data.val_dataloader()))

    content = json.loads((folder / MANIFEST).read_text())
    assert surprises(wrong_contents(content), read, str(folder)) == []


def test_what_was_checked_is_read_anew_if_it_is_no_such_list(store: Path) -> None:
    TokenStore(store).check()
    content = json.loads((store / CHECKED).read_text())
    for wrong, changed in wrong_contents(content, alike=2):
        (store / CHECKED).write_text(json.dumps(changed))
        TokenStore(store).check()
        assert json.loads((store / CHECKED).read_text()) == content, wrong


def interrupted(corpus: LocalFiles, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unfinished store with a finished shard."""
    close = ShardWriter.close

    def stop(self: ShardWriter) -> Any:
        if self.number == 1:
            raise KeyboardInterrupt
        return close(self)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, corpus, CONFIG, 0.2, shard_size=SHARD)
    return folder.with_name(f"{folder.name}.tmp")


def test_the_record_of_a_finished_shard_that_is_none_is_made_again(
    corpus: LocalFiles, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = interrupted(corpus, tmp_path / "store", monkeypatch)
    shutil.copytree(unfinished, tmp_path / "kept")
    record = json.loads((unfinished / "shard-00000.json").read_text())
    for wrong, changed in wrong_contents(record):
        shutil.copytree(tmp_path / "kept", unfinished, dirs_exist_ok=True)
        (unfinished / "shard-00000.json").write_text(json.dumps(changed))
        assert _finished(unfinished, SHARD) == [], wrong
        assert [path.name for path in unfinished.iterdir()] == [TOKENIZER], wrong
    prepare(tmp_path / "store", corpus, CONFIG, 0.2, shard_size=SHARD)
    assert tree(tmp_path / "store") == tree(whole)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"model": 3}'])
def test_a_tokenizer_that_a_kill_left_damaged_is_trained_again(
    content: bytes, corpus: LocalFiles, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = interrupted(corpus, tmp_path / "store", monkeypatch)
    (unfinished / TOKENIZER).write_bytes(content)
    prepare(tmp_path / "store", corpus, CONFIG, 0.2, shard_size=SHARD)
    assert tree(tmp_path / "store") == tree(whole)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"model": 3}'])
def test_a_checkpoints_tokenizer_in_the_cache_is_written_again(content: bytes, tmp_path: Path) -> None:
    text = ready(datamodule(tmp_path)).tokenizer.to_text()
    data = datamodule(tmp_path, corpus=LocalFiles([str(write_corpus(tmp_path / "other.jsonl", seed=1))]))
    data.adopt_tokenizer(text)
    assert data.tokenizer_config.file is not None
    file = Path(data.tokenizer_config.file)
    file.write_bytes(content)
    again = datamodule(tmp_path, corpus=data.corpus)
    again.adopt_tokenizer(text)
    assert ready(again).tokenizer.to_text() == text


@EVERY
def test_every_key_of_a_tokenizer(every: bool, whole: Path, tmp_path: Path) -> None:
    content = json.loads((whole / TOKENIZER).read_text())
    merged = json.loads((whole / TOKENIZER).read_text())
    start = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    merged["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<|endoftext|>": start},
    }
    file = tmp_path / TOKENIZER

    def read(content: Any) -> None:
        file.write_text(json.dumps(content))
        tokenizer = Tokenizer.load(file)
        assert tokenizer.decode(tokenizer.encode("some text")) == "some text"

    for each in (content, merged):
        contents = wrong_contents(each, alike=2)
        assert surprises(contents if every else one_each(contents), read, str(file)) == []


@pytest.mark.parametrize("key", ["text", "other"])
@pytest.mark.parametrize(
    "line", ["null", "-1", "1e400", "NaN", '"text"', '""', "[]", "{}", "true", "[[[1]]]", "{", "[" * 10**5]
)
def test_lines_of_a_corpus(line: str, key: str, tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"

    def read(content: str) -> None:
        file.write_text(f'{{"text": "good"}}\n{content}\n')
        [*LocalFiles([str(file)], text_key="text").documents()]

    whole_line, inside = line, f'{{"{key}": {line}}}'
    assert surprises(iter([("line", whole_line), ("value", inside)]), read, str(file)) == []
