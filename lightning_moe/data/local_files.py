"""A corpus of local files: plain text, JSON lines, parquet."""

import codecs
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from lightning_moe.data.corpora import Corpus, Document
from lightning_moe.data.find_files import KEY, find_files
from lightning_moe.errors import UserError

# Larger files are identified by their size and 64 evenly spaced blocks of 1 MiB, so that a start on a terabyte does
# not read it twice. An edit that changes neither the size nor any of these blocks goes unnoticed.
HASH_WHOLE_BELOW = 256 * 2**20
BLOCK = 2**20
BLOCKS = 64
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
PARQUET = ".parquet"


class LocalFiles(Corpus):
    """Plain text, `.jsonl` (one document per line; also `.ndjson`) and `.parquet` (one per row), read as a stream.

    Suffixes may be in capitals. Each file is read once, also where links lead to it again. What is left out is printed.

    Args:
        paths: Files, folders (all their files but hidden ones, linked folders too) and globs (`**` too); or a mapping
            from a domain to these, such as `{code: [src/**/*.py], prose: [books]}`.
        text_key: Key or column of the text in `.jsonl` and `.parquet` files.
        separator: Text between two documents of a plain text file. Null: each file is one document.
    """

    def __init__(
        self, paths: list[str] | dict[str, list[str]], text_key: str = "text", separator: str | None = None
    ) -> None:
        if separator == "":
            raise UserError("data.corpus.separator is empty; null means that each file is one document.")
        self.paths = paths
        self.text_key = text_key
        self.separator = separator

    def documents(self) -> Iterator[Document]:
        """Yield the domains in the given order, and the files of each domain in the order of their paths."""
        for domain, name, path in self._files():
            if path.stat().st_size == 0:
                raise UserError(f"{path} is empty.")
            kind = kind_of(path)
            if kind == "jsonl":
                texts = _json_lines(path, self.text_key)
            elif kind == "parquet":
                texts = _parquet(path, self.text_key)
            else:
                texts = _plain_text(path, self.separator)
            for row, text in texts:
                yield Document(f"{name}#{row}", text, domain)

    def fingerprint_fields(self) -> dict[str, object]:
        """Return the number, bytes and digest of the files; their place on this machine does not matter."""
        files = self._files()
        digest = hashlib.sha256()
        for domain, name, path in files:
            kind = kind_of(path)  # left out for these suffixes, so that data prepared earlier is found
            more = [] if kind == "text" or path.suffix in (".jsonl", ".parquet") else [kind]
            digest.update(json.dumps([domain, name, path.stat().st_size, file_digest(path), *more]).encode())
        size = sum(path.stat().st_size for _, _, path in files)
        return {
            "corpus": "LocalFiles",
            "files": len(files),
            "bytes": size,
            "sha256": digest.hexdigest(),
            "text_key": self.text_key,
            "separator": self.separator,
        }

    def _files(self) -> list[tuple[str, str, Path]]:
        """Return (domain, name, path) of each file; the name is relative to the folder that all files share."""
        domains = self.paths if isinstance(self.paths, dict) else {"text": self.paths}
        found: dict[str, tuple[Path, str]] = {}  # by the place on the disk
        for domain, patterns in domains.items():
            for pattern in patterns:
                matching = find_files(pattern)
                for path in matching.files:
                    first, its_domain = found.setdefault(os.path.realpath(path), (path, domain))
                    if its_domain != domain:
                        raise UserError(f"{KEY}: {path} is in two domains, {its_domain} and {domain}.")
                    if first != path:
                        matching.left_out[path] = f"because it is the same file as {first}"
                matching.say()
        if not found:
            raise UserError(f"{KEY} is empty: name files, folders or globs.")
        shared = os.path.commonpath([path.parent for path, _ in found.values()])
        return [(domain, path.relative_to(shared).as_posix(), path) for path, domain in found.values()]


def kind_of(path: Path) -> str:
    """Return how a file is read, by its suffix in small or capital letters: ``jsonl``, ``parquet`` or ``text``."""
    suffix = path.suffix.lower()
    return "jsonl" if suffix in JSON_LINES else "parquet" if suffix == PARQUET else "text"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or above 256 MiB that of 64 of its blocks.

    Raises:
        UserError: the file cannot be read.
    """
    digest = hashlib.sha256()
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            if size <= HASH_WHOLE_BELOW:
                return hashlib.file_digest(file, "sha256").hexdigest()
            for i in range(BLOCKS):
                file.seek((size - BLOCK) * i // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None
    return digest.hexdigest()


def _plain_text(path: Path, separator: str | None) -> Iterator[tuple[int, str]]:
    """Yield the documents of a text file; with a separator, at most one document and one block are in memory."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, number, start = "", 0, 0  # start: offset in the file of what the decoder has not taken in
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK if separator is not None else -1):
                waiting = len(decoder.getstate()[0])
                text += decoder.decode(block)
                start += len(block)
                if separator is not None:
                    *documents, text = text.split(separator)
                    yield from enumerate(documents, number)
                    number += len(documents)
            waiting = len(decoder.getstate()[0])
            text += decoder.decode(b"", final=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {start - waiting + error.start} is "
            f"0x{error.object[error.start]:02x}). Only .jsonl and .parquet are read as tables; a glob can leave other "
            "files out."
        ) from None
    yield number, text


def _json_lines(path: Path, text_key: str) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _text_of_line(line, f"{path}, line {number}", text_key)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None


def _text_of_line(line: bytes, where: str, text_key: str) -> str:
    try:
        row = json.loads(line)
        text: str = row[text_key]
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {text_key!r} holds half of a surrogate pair.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    except KeyError:
        raise UserError(f"{where} has no {text_key!r}; it has {sorted(row)}. Set data.corpus.text_key.") from None
    except (TypeError, AttributeError):
        raise UserError(f"{where}: expected an object with a string {text_key!r}, not {_shortened(line)}.") from None
    return text


def _parquet(path: Path, text_key: str) -> Iterator[tuple[int, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_key not in columns:
                raise UserError(f"{path} has no column {text_key!r}; it has {columns}. Set data.corpus.text_key.")
            batches = file.iter_batches(batch_size=1024, columns=[text_key])
            for row, text in enumerate(itertools.chain.from_iterable(b.column(0).to_pylist() for b in batches)):
                if isinstance(text, str):
                    yield row, text
                elif text is not None:
                    raise UserError(f"{path}, row {row}: {text_key!r} is {type(text).__name__}, not a string.")
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from None


def _shortened(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return text if len(text) <= 60 else text[:60] + "…"
