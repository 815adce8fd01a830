"""Local files: what is read, under which name and domain, and what each defect is called."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.data import LocalFiles, local_files
from lightning_moe.errors import UserError


def read(*paths: Path | str, **settings: str) -> list[tuple[str, str, str]]:
    return [tuple(d) for d in LocalFiles([str(p) for p in paths], **settings).documents()]


def test_plain_text_is_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("zwei\r\nZeilen ä\n".encode())
    (tmp_path / "a.md").write_text("eins")
    assert read(tmp_path) == [("a.md#0", "eins", "text"), ("b.txt#0", "zwei\r\nZeilen ä\n", "text")]


def test_a_separator_makes_documents_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<END>two<END>three")
    texts = [text for _, text, _ in read(tmp_path / "a.txt", separator="<END>")]
    assert texts == ["one", "two", "three"]


def test_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\\u00e4", "n": 1}\n\n{"text": ""}\n{"text": "\\ud83e\\udd9c"}\n')
    assert read(tmp_path) == [
        ("a.jsonl#1", "xä", "text"),
        ("a.jsonl#3", "", "text"),
        ("a.jsonl#4", "\U0001f99c", "text"),
    ]


def test_parquet_in_row_groups(tmp_path: Path) -> None:
    texts = [f"row {i}" if i % 7 else None for i in range(3000)]
    pq.write_table(pa.table({"body": texts, "n": range(3000)}), tmp_path / "a.parquet", row_group_size=700)
    expected = [(f"a.parquet#{i}", text, "text") for i, text in enumerate(texts) if text]
    assert read(tmp_path, text_key="body") == expected


def test_folders_globs_and_domains(tmp_path: Path) -> None:
    for name in ("src/a.py", "src/deep/b.py", "books/c.txt", "books/.hidden", ".git/config"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = LocalFiles({"code": [f"{tmp_path}/src/**/*.py"], "prose": [f"{tmp_path}/books"]})
    assert [(d.name, d.domain) for d in corpus.documents()] == [
        ("src/a.py#0", "code"),
        ("src/deep/b.py#0", "code"),
        ("books/c.txt#0", "prose"),
    ]
    with pytest.raises(UserError, match=r"c\.txt is in two domains, code and prose"):
        list(LocalFiles({"code": [f"{tmp_path}/**/*.txt"], "prose": [f"{tmp_path}/books"]}).documents())


def test_fingerprint_is_of_content_and_not_of_place(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place / "deep").mkdir(parents=True)
        (tmp_path / place / "a.txt").write_text("a")
        (tmp_path / place / "deep" / "b.txt").write_text("b")

    def fingerprint(place: str, **settings: str) -> str:
        return json.dumps(LocalFiles([f"{tmp_path}/{place}"], **settings).fingerprint_fields())

    assert fingerprint("here") == fingerprint("there")
    assert fingerprint("here") != fingerprint("here", text_key="body")
    (tmp_path / "there" / "a.txt").write_text("c")
    assert fingerprint("here") != fingerprint("there")


def test_large_files_are_identified_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "HASH_WHOLE_BELOW", 1000)
    monkeypatch.setattr(local_files, "BLOCK", 10)
    path = tmp_path / "large"
    path.write_bytes(bytes(5000))
    before = local_files.file_digest(path)
    for place in (0, 9, 4999, 4990):  # first and last block
        path.write_bytes(bytes(place) + b"x" + bytes(4999 - place))
        assert local_files.file_digest(path) != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt is empty"),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8 text \(byte 3 is 0xe9\)"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad\.jsonl, line 2 is not JSON"),
        ("bytes.jsonl", b'{"text": "\xe9"}\n', r"bytes\.jsonl, line 1 is not JSON"),
        ("key.jsonl", b'{"text": "a"}\n{"body": "b", "id": 1}\n', r"key\.jsonl, line 2 has no 'text'.*'body', 'id'"),
        ("number.jsonl", b'{"text": 5}\n', r"number\.jsonl, line 1: expected an object with a string 'text'"),
        ("list.jsonl", b'["a"]\n', r"list\.jsonl, line 1: expected an object.*\[\"a\"\]"),
        ("half.jsonl", b'{"text": "\\ud83e"}\n', r"half\.jsonl, line 1: 'text' holds half of a surrogate pair"),
        ("bad.parquet", b"PAR1 not really", r"bad\.parquet cannot be read as parquet"),
    ],
)
def test_defects_are_named_with_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_defects_of_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text'; it has \['body', 'n'\]"):
        read(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 0: 'n' is int, not a string"):
        read(tmp_path / "a.parquet", text_key="n")


def test_nothing_there(tmp_path: Path) -> None:
    for pattern in ("missing.txt", "*.txt", "**/*.txt"):
        with pytest.raises(UserError, match=r"no file matches .*txt"):
            read(tmp_path / pattern)
    with pytest.raises(UserError, match="no file matches"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"paths is empty"):
        read()
    with pytest.raises(UserError, match="separator is empty"):
        LocalFiles(["x"], separator="")


@given(st.lists(st.text("aä🦜<E>", max_size=6), min_size=1, max_size=6), st.integers(1, 9))
def test_a_separated_file_is_read_in_blocks(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], block: int
) -> None:
    """Wherever a block ends: inside a separator, inside a character."""
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    content = "<E>".join([*texts, "end"])
    path.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_files, "BLOCK", block)
        assert [text for _, text, _ in read(path, separator="<E>")] == content.split("<E>")
        path.write_bytes(content.encode() + b"\xff")
        with pytest.raises(UserError, match=rf"byte {len(content.encode())} is 0xff"):
            read(path, separator="<E>")
