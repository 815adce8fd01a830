"""Preparing and reading the store: against a plain loop, and through damage, crashes and races."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from small_corpus import write_corpus

from lightning_moe import checksums
from lightning_moe.data import Corpus, Document, LocalFiles, Tokenizer, TokenizerConfig
from lightning_moe.data.prepare import cache_key, prepare
from lightning_moe.data.split import SPLITS, split_of
from lightning_moe.data.token_store import TokenStore
from lightning_moe.errors import UserError

PATIENCE = 120.0
CONFIG = TokenizerConfig(vocab_size=300)
FRACTION = 0.2


class Texts(Corpus):
    """A corpus in memory that counts how often it is read, and can stop in the middle."""

    def __init__(self, texts: list[str], stop: BaseException | None = None) -> None:
        self.texts = texts
        self.stop = stop
        self.reads = 0

    def documents(self) -> Iterator[Document]:
        self.reads += 1
        for i, text in enumerate(self.texts):
            if self.stop is not None and self.reads == 2 and i == len(self.texts) // 2:
                raise self.stop  # while encoding
            yield Document(f"d{i}", text, "even" if i % 2 == 0 else "odd")

    def fingerprint_fields(self) -> dict[str, object]:
        return {"texts": self.texts}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = write_corpus(tmp_path_factory.mktemp("texts") / "c.jsonl", documents=60)
    lines = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return [*lines, "", lines[0], "literal <|endoftext|> and naïve ü"]


@pytest.fixture
def store(tmp_path: Path, texts: list[str]) -> TokenStore:
    prepare(tmp_path / "store", Texts(texts), CONFIG, FRACTION)
    return TokenStore(tmp_path / "store")


def test_tokens_and_index_against_a_plain_loop(store: TokenStore, texts: list[str]) -> None:
    tokenizer = Tokenizer.load(store.directory / "tokenizer.json")
    assert tokenizer.vocab_size == 300
    for split in SPLITS:
        tokens: list[int] = []
        starts: list[tuple[str, str, int]] = []
        for document in Texts(texts).documents():
            if document.text and split_of(document.text, FRACTION) == split:
                starts.append((document.name, document.domain, len(tokens)))
                tokens += [0, *tokenizer.encode(document.text)]
        assert store.tokens(split).tolist() == tokens
        assert store.tokens(split).dtype == np.uint16
        index = store.documents(split)
        assert list(zip(index["name"], index["domain"], index["start"], strict=True)) == starts
        counts = store.counts(split)
        text = store.text(split)
        assert text == "".join(t for t in texts if split_of(t, FRACTION) == split).encode()
        assert (counts.documents, counts.tokens, counts.bytes) == (len(starts), len(tokens), len(text))
        assert store.domain_counts(split).keys() == {"even", "odd"}
    store.check(everything=True)


def test_no_text_is_in_both_splits(store: TokenStore, texts: list[str]) -> None:
    """Not even one that occurs twice."""
    held_out = set(store.documents("validation")["name"])
    kept = set(store.documents("train")["name"])
    assert not held_out & kept
    assert len(held_out) + len(kept) == len([t for t in texts if t])
    assert not {texts[int(n[1:])] for n in held_out} & {texts[int(n[1:])] for n in kept}


def test_the_tokenizer_has_not_seen_the_validation_text(tmp_path: Path, texts: list[str]) -> None:
    """Other validation documents, same training documents: the same tokenizer."""
    prepare(tmp_path / "a", Texts(texts), CONFIG, FRACTION)
    others = [t for t in texts if split_of(t, FRACTION) == "train"]
    others += [t for i in range(200) if split_of(t := f"zzzz zzzz {i}", FRACTION) == "validation"]
    prepare(tmp_path / "b", Texts(others), CONFIG, FRACTION)
    assert TokenStore(tmp_path / "a").tokenizer.fingerprint == TokenStore(tmp_path / "b").tokenizer.fingerprint


def test_large_vocabularies_take_four_bytes(tmp_path: Path, texts: list[str]) -> None:
    prepare(tmp_path / "small", Texts(texts), CONFIG, FRACTION)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "small" / "tokenizer.json"))
    backend.add_tokens([f"[unused {i}]" for i in range(2**16 + 1 - 300)])
    backend.save(str(tmp_path / "large.json"))
    config = TokenizerConfig(vocab_size=2**16 + 1, file=str(tmp_path / "large.json"))
    prepare(tmp_path / "large", Texts(["[unused 65235] x", *texts]), config, 0.2)
    store = TokenStore(tmp_path / "large")
    assert store.tokens("train").dtype == np.uint32
    assert {*store.tokens("train").tolist(), *store.tokens("validation").tolist()} >= {2**16 - 1}
    assert store.tokenizer.token_bytes[-1] == len("[unused 65236]")


def test_given_tokenizer_of_another_size(tmp_path: Path, store: TokenStore, texts: list[str]) -> None:
    file = str(store.directory / "tokenizer.json")
    with pytest.raises(UserError, match=r"vocab_size=4096 does not match .*tokenizer\.json, which has 300"):
        prepare(tmp_path / "other", Texts(texts), TokenizerConfig(file=file), FRACTION)


def test_prepared_once(tmp_path: Path, texts: list[str]) -> None:
    first, second = Texts(texts), Texts(texts)
    prepare(tmp_path / "s", first, CONFIG, FRACTION)
    prepare(tmp_path / "s", second, CONFIG, FRACTION)
    assert (first.reads, second.reads) == (2, 0)


def test_cache_key_follows_everything_that_matters(texts: list[str], store: TokenStore, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_bytes((store.directory / "tokenizer.json").read_bytes())
    given = TokenizerConfig(300, str(file))
    keys = [
        cache_key(Texts(texts), CONFIG, 0.2),
        cache_key(Texts(texts[1:]), CONFIG, 0.2),
        cache_key(Texts(texts), TokenizerConfig(301), 0.2),
        cache_key(Texts(texts), TokenizerConfig(300, training_bytes=9), 0.2),
        cache_key(Texts(texts), CONFIG, 0.3),
        cache_key(Texts(texts), given, 0.2),
    ]
    assert len(set(keys)) == len(keys)
    assert cache_key(Texts(texts), CONFIG, 0.2) == keys[0]
    assert cache_key(Texts(texts), given, 0.2) == keys[-1]
    file.write_text(file.read_text() + " ")
    assert cache_key(Texts(texts), given, 0.2) != keys[-1]


@pytest.mark.parametrize("name", ["train-00000.tokens", "validation-00000.documents.parquet", "tokenizer.json"])
def test_a_truncated_file_is_named(store: TokenStore, name: str) -> None:
    path = store.directory / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(
        UserError, match=rf"damaged: .*{name} is \d+ bytes long, not \d+: it ends at offset \d+.*Delete"
    ):
        TokenStore(store.directory)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name} is missing"):
        TokenStore(store.directory)


def test_a_changed_byte_is_found_with_its_place(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "BLOCK", 1000)
    prepare(tmp_path / "s", Texts(texts), CONFIG, FRACTION)
    path = tmp_path / "s" / "train-00000.tokens"
    store = TokenStore(tmp_path / "s")
    store.check()
    content = bytearray(path.read_bytes())
    assert len(content) > 4000
    content[2100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000\.tokens does not match .*: offsets 2000 to 3000 have changed"):
        TokenStore(tmp_path / "s").check()


def test_a_token_that_is_none_is_named(store: TokenStore) -> None:
    path = store.directory / "validation-00000.tokens"
    store.check()
    np.memmap(path, "<u2", mode="r+")[[30, 40]] = 300
    with pytest.raises(
        UserError, match=r"validation-00000\.tokens holds token 300 at offset 60, .* vocabulary has 300"
    ):
        TokenStore(store.directory).check()


def test_what_was_checked_is_not_read_again_unless_asked(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = checksums.digest
    monkeypatch.setattr(checksums, "digest", lambda path: (read.append(path.name), original(path))[1])
    store.check()
    assert sorted(read) == sorted(store.manifest["files"])
    store.check()
    assert len(read) == 5
    os.utime(store.directory / "tokenizer.json")
    store.check()
    assert read[5:] == ["tokenizer.json"]
    store.check(everything=True)
    assert len(read) == 6 + 5


def test_a_damaged_manifest(store: TokenStore) -> None:
    (store.directory / "manifest.json").write_text('{"format": 1,')
    with pytest.raises(UserError, match=r"manifest\.json: is not JSON"):
        TokenStore(store.directory)
    (store.directory / "manifest.json").unlink()
    with pytest.raises(UserError, match="No prepared data"):
        TokenStore(store.directory)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), UserError("bad line"), OSError(28, "No space left on device")])
def test_after_an_interruption_there_is_no_store(tmp_path: Path, texts: list[str], stop: BaseException) -> None:
    """Of a corpus that has to change, nothing stays at all."""
    with pytest.raises(UserError if isinstance(stop, OSError) else type(stop)):
        prepare(tmp_path / "s", Texts(texts, stop), CONFIG, FRACTION)
    left = [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"]
    assert left == ([] if isinstance(stop, UserError) else ["s.tmp"])


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "no text to train a tokenizer on"),
        (["", ""], "no text to train a tokenizer on"),
        (["only one text that is long enough, twice, twice, twice, twice, twice"], "one document only|no text"),
        (["validation_fraction is small"] * 3, r"validation_fraction=0\.0001: none of the 3 .* validation"),
    ],
)
def test_too_few_documents(tmp_path: Path, documents: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "s", Texts(documents), TokenizerConfig(vocab_size=258), 0.0001)


def test_the_fraction_in_the_message_is_enough(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(UserError, match="first one above") as caught:
        prepare(tmp_path / "s", Texts(texts), CONFIG, 1e-6)
    needed = float(str(caught.value).split("above ")[1].rstrip(". ")) + 1e-4
    prepare(tmp_path / "s", Texts(texts), CONFIG, needed)
    assert TokenStore(tmp_path / "s").counts("validation").documents >= 1


def test_no_place_to_write(tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in"):
        prepare(tmp_path / "file" / "deep" / "s", Texts(texts), CONFIG, FRACTION)


class Slow(Texts):
    """Reports each reading in a file, and takes its time to encode."""

    def __init__(self, texts: list[str], report: Path) -> None:
        super().__init__(texts)
        self.report = report

    def documents(self) -> Iterator[Document]:
        with self.report.open("a") as file:
            file.write(f"{os.getpid()}\n")
        for document in super().documents():
            time.sleep(0.01)
            yield document


def run_prepare(directory: Path, corpus: Slow) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the parent's threads are not in this fork
    prepare(directory, corpus, CONFIG, FRACTION)


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, f"{path} never had {count} lines"
        time.sleep(0.01)


def test_two_processes_at_once_and_one_killed(tmp_path: Path, texts: list[str]) -> None:
    """Two want the same data; the one that works is killed in the middle; the other takes over."""
    report = tmp_path / "report"
    context = multiprocessing.get_context("fork")
    both = [
        context.Process(target=run_prepare, args=(tmp_path / "s", Slow(texts, report)), daemon=True) for _ in range(2)
    ]
    for process in both:
        process.start()
    wait_for_lines(report, 2)  # read for the tokenizer, and again to encode
    working = int(report.read_text().splitlines()[0])
    assert not (tmp_path / "s").exists()
    os.kill(working, signal.SIGKILL)
    for process in both:
        process.join(PATIENCE)
    assert sorted(p.exitcode for p in both) == [-signal.SIGKILL, 0]
    readers = report.read_text().splitlines()
    assert readers[:2] == [str(working)] * 2
    assert len(set(readers)) == 2
    assert len(readers) == 3  # the tokenizer was there already
    TokenStore(tmp_path / "s").check(everything=True)
    assert not (tmp_path / "s.tmp").exists()


def test_local_files_from_end_to_end(tmp_path: Path) -> None:
    file = write_corpus(tmp_path / "c.jsonl")
    prepare(tmp_path / "s", LocalFiles([str(file)]), CONFIG, FRACTION)
    assert TokenStore(tmp_path / "s").manifest["corpus"]["files"] == 1
