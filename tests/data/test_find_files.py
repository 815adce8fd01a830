"""Each file is read once, whatever links there are, and what is not read is named."""

import logging
import os
from pathlib import Path

import pytest

from lightning_moe.data import LocalFiles
from lightning_moe.data.find_files import find_files
from lightning_moe.errors import UserError


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def found(folder: Path, glob: str = "") -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_files(f"{folder}/{glob}").files]


@pytest.mark.parametrize("glob", ["", "**", "**/*.txt", "*/**/*.txt"])
def test_links_to_folders_above_do_not_multiply_a_corpus(tmp_path: Path, glob: str) -> None:
    make(tmp_path, "sub/a.txt", "sub/deep/b.txt")
    for number in range(3):  # followed 40 times each, they would take for ever
        (tmp_path / f"sub/up{number}").symlink_to("..")
        (tmp_path / f"sub/deep/up{number}").symlink_to("../..")
    assert found(tmp_path, glob) == ["sub/a.txt", "sub/deep/b.txt"]


@pytest.mark.parametrize("glob", ["", "**/*.txt"])
def test_linked_folders_are_read_under_their_own_name_if_they_have_one(tmp_path: Path, glob: str) -> None:
    make(tmp_path, "corpus/z/a.txt", "elsewhere/b.txt")
    (tmp_path / "corpus/first").symlink_to("z")
    (tmp_path / "corpus/there").symlink_to("../elsewhere")
    (tmp_path / "corpus/again").symlink_to("../elsewhere")
    result = find_files(f"{tmp_path}/corpus/{glob}")
    assert [str(path.relative_to(tmp_path / "corpus")) for path in result.files] == ["again/b.txt", "z/a.txt"]
    assert {path.name for path in result.left_out} == {"first", "there"}
    assert [path.name for path in result.linked] == ["again"]


def test_what_is_left_out_has_its_reason(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", ".git/config", ".hidden")
    (tmp_path / "link.txt").symlink_to("a.txt")
    (tmp_path / "dangling.txt").symlink_to("gone.txt")
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    os.mkfifo(tmp_path / "pipe")
    result = find_files(str(tmp_path))
    assert result.files == [tmp_path / "a.txt"]
    reasons = {path.name: reason for path, reason in result.left_out.items()}
    assert reasons == {
        ".git": "because it is hidden",
        ".hidden": "because it is hidden",
        "link.txt": f"because it is a link to {tmp_path / 'a.txt'}",
        "dangling.txt": "because the link leads nowhere",
        "circle.txt": "because the link leads nowhere",
        "pipe": "because it is no regular file",
    }


def test_a_glob_leaves_out_what_matches_and_is_hidden(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", ".b.txt", ".c.py", "d.py")
    assert found(tmp_path, "*.txt") == ["a.txt"]
    assert [path.name for path in find_files(f"{tmp_path}/*.txt").left_out] == [".b.txt"]
    assert found(tmp_path, ".*.txt") == [".b.txt"]
    assert found(tmp_path, "[ad].*") == ["a.txt", "d.py"]


def test_the_same_file_by_two_paths_is_read_once_and_that_is_printed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "real/a.txt")
    (tmp_path / "alias").symlink_to("real")
    corpus = LocalFiles([f"{tmp_path}/real", f"{tmp_path}/alias"])
    with caplog.at_level(logging.INFO):
        assert len(list(corpus.documents())) == len(list(corpus.documents())) == 1
    line = f"Left out, because it is the same file as {tmp_path}/real/a.txt: {tmp_path}/alias/a.txt"
    assert caplog.messages.count(line) == 1
    with pytest.raises(UserError, match="is in two domains, a and b"):
        list(LocalFiles({"a": [f"{tmp_path}/real"], "b": [f"{tmp_path}/alias"]}).documents())


@pytest.mark.parametrize("glob", ["", "**/*.txt", "*/*.txt"])
def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, glob: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "open/a.txt", "closed/b.txt")
    scandir = os.scandir

    def without_permission(path: Path) -> object:  # root may read everything
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", without_permission)
    with pytest.raises(UserError, match=r"folder .*closed cannot be read: Permission denied"):
        find_files(f"{tmp_path}/{glob}")


def test_a_dangling_link_is_named_where_nothing_else_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("gone.txt")
    for name in ("a.txt", "*.txt", ""):
        with pytest.raises(UserError, match=r"no file matches .*left out: .*a\.txt \(because the link leads nowhere\)"):
            find_files(f"{tmp_path}/{name}")
    with pytest.raises(UserError, match="no file matches"):
        find_files(f"{tmp_path}/gone/*.txt")


@pytest.mark.parametrize("name", ["A.JSONL", "a.Jsonl", "a.ndjson", "a.NDJSON", "a.jsonlines"])
def test_json_lines_of_any_suffix_are_no_plain_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "x"}\n{"text": "y"}\n')
    assert [document.text for document in LocalFiles([str(tmp_path)]).documents()] == ["x", "y"]
    (tmp_path / name).write_text("plain")
    with pytest.raises(UserError, match="is not JSON"):
        list(LocalFiles([str(tmp_path)]).documents())


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files("~").files == find_files("~/*.txt").files == [tmp_path / "a.txt"]
    with pytest.raises(UserError, match="there is no such home folder"):
        find_files("~nobody-of-that-name/a")
