"""Windows of the analysed text: every token once, in order, read no further than needed."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.analysis import text
from lightning_moe.analysis.text import PIECE_CHARACTERS, Domain, batches, file_domain, windows
from lightning_moe.data import Tokenizer
from lightning_moe.errors import UserError


def domain(documents: list[list[int]], name: str = "d") -> Domain:
    return Domain(name, "test", lambda: iter(documents))


@given(
    documents=st.lists(st.lists(st.integers(1, 99), max_size=12), max_size=5),
    length=st.integers(1, 6),
    max_tokens=st.none() | st.integers(1, 30),
)
def test_every_token_but_the_first_is_a_label_once(
    documents: list[list[int]], length: int, max_tokens: int | None
) -> None:
    ids = list(itertools.chain(*documents))
    wanted = len(ids) - 1 if max_tokens is None else min(max_tokens, len(ids) - 1)
    pairs = []
    for inputs, labels in windows(domain(documents), length, max_tokens):
        assert len(inputs) == len(labels) == length
        pairs += [(i, label) for i, label in zip(inputs, labels, strict=True) if label != -100]
    assert pairs == list(itertools.pairwise(ids))[: max(0, wanted)]


def test_no_more_is_read_than_asked_for() -> None:
    read = []

    def endless() -> Iterator[Sequence[int]]:
        for number in itertools.count():
            read.append(number)
            yield [number] * 5

    assert len(list(windows(Domain("endless", "test", endless), 4, 10))) == 3
    assert len(read) <= 4


def test_batches_mix_the_domains_as_long_as_they_last() -> None:
    short, long = domain([[1] * 5], "short"), domain([[2] * 17], "long")
    got = list(batches([short, long], 4, 3, None))
    assert [batch.domains.tolist() for batch in got] == [[0, 1, 1], [1, 1]]
    assert got[0].input_ids.tolist() == [[1] * 4, [2] * 4, [2] * 4]
    assert got[0].labels.dtype == got[0].domains.dtype


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some words and some other words, again and again"] * 3, 270)


def test_files_of_a_user(tmp_path: Path, tokenizer: Tokenizer) -> None:
    content = "\n".join(f"line {number} with words" for number in range(20))
    (tmp_path / "a.txt").write_text(content)
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": part}) for part in ("one", "two")))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.md").write_text("x")
    end = tokenizer.end_of_text_id
    for path, expected in (
        ("a.txt", [[end], tokenizer.encode(content)]),
        ("b.jsonl", [[end, *tokenizer.encode("one")], [end, *tokenizer.encode("two")]]),
        ("folder", [[end, *tokenizer.encode("x")]]),
    ):
        found = file_domain("mine", str(tmp_path / path), tokenizer)
        assert list(found.documents()) == expected
        assert list(found.documents()) == expected  # a stream that can be opened again


def test_a_large_file_comes_in_pieces_of_whole_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    line = "words and words\n"
    (tmp_path / "large.txt").write_text(line * (PIECE_CHARACTERS // len(line) + 10))
    found = list(file_domain("large", str(tmp_path / "large.txt"), tokenizer).documents())
    assert len(found) == 3
    assert tokenizer.decode(found[1]).endswith("\n")
    assert "".join(map(tokenizer.decode, found)) == (tmp_path / "large.txt").read_text()


def test_a_file_without_line_ends_comes_in_pieces_too(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 100)
    (tmp_path / "long.txt").write_text("words " * 200)
    found = list(file_domain("long", str(tmp_path / "long.txt"), tokenizer).documents())
    assert len(found) == 1 + 6
    assert "".join(map(tokenizer.decode, found[1:])) == "words " * 200


def test_a_domain_without_text_is_named() -> None:
    """Beside others, too: shares and distances of no tokens would look like numbers."""
    for empty in ([], [[1]]):
        with pytest.raises(UserError, match=r"domain none \(test\): there is no text to analyse"):
            list(batches([domain([[2] * 17], "some"), domain(empty, "none")], 4, 3, None))


def test_bad_domains_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"--text mine=.*gone.txt: no file matches"):
        file_domain("mine", str(tmp_path / "gone.txt"), tokenizer)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"--text mine=.*binary.txt: .*utf-8"):
        list(file_domain("mine", str(tmp_path / "binary.txt"), tokenizer).documents())
