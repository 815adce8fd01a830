"""Encoded tokens on disk: one folder per corpus, tokenizer and split, read through memory maps.

    manifest.json               source, tokenizer, counts, checksums; written last
    tokenizer.json
    train-00000.tokens          uint16 or uint32, little-endian: every document is <|endoftext|> and its tokens
    train-00000.documents.parquet   name, domain, start (token index in this shard) of each document
    validation-00000.…
    train-00001.…
    checked.json                state of the files that was read and found right

The folder appears under its final name only when it is complete (see `prepare`). A shard holds whole documents, but its
borders mean nothing to a reader: a split is the row of its shards' tokens, and windows cross the borders.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Interval
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import TypedDict

from lightning_moe.atomic import write_atomically
from lightning_moe.checksums import Digest, blocks, damage, damage_inside
from lightning_moe.data.sharded_tokens import ShardedTokens
from lightning_moe.data.split import Split
from lightning_moe.data.tokenizer import Tokenizer
from lightning_moe.errors import UserError
from lightning_moe.file_schema import read_json
from lightning_moe.trust import is_file_name

FORMAT = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
CHECKED = "checked.json"

Whole = Annotated[int, Interval(ge=0, lt=2**62)]


@dataclass(frozen=True)
class Shard:
    """A run of whole documents of one split: their tokens, and the index of where each starts."""

    tokens_file: str
    documents_file: str
    tokens: Whole


@dataclass(frozen=True)
class Counts:
    """Size of a split or of one of its domains.

    Args:
        documents: number of documents.
        tokens: number of tokens, one `<|endoftext|>` per document included.
        bytes: bytes of text, without special tokens.
    """

    documents: Whole = 0
    tokens: Whole = 0
    bytes: Whole = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.documents + other.documents, self.tokens + other.tokens, self.bytes + other.bytes)


class SplitContent(TypedDict):
    """Shards of a split in order, and counts of each domain."""

    shards: list[Shard]
    domains: dict[str, Counts]


class TokenizerFacts(TypedDict):
    """What the manifest says of the tokenizer."""

    vocab_size: Annotated[int, Interval(gt=0, le=2**32)]
    fingerprint: str


class Manifest(TypedDict):
    """Content of ``manifest.json``, which `store_writer.write_manifest` writes."""

    format: Literal[2]
    corpus: dict[str, Any]
    tokenizer: TokenizerFacts
    validation_fraction: float
    dtype: Literal["<u2", "<u4"]
    splits: dict[Split, SplitContent]
    software: dict[str, str]
    files: dict[str, Digest]


class TokenStore:
    """A prepared folder, opened for reading.

    Raises:
        UserError: a file is missing or has another size than it was written with; names the file and the offset.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / MANIFEST
        try:
            self.manifest = read_json(path, Manifest)
        except FileNotFoundError:
            raise UserError(f"No prepared data in {directory}: prepare_data() has to run first.") from None
        except UserError as error:
            raise self._damaged(str(error)) from None
        for name, expected in self.manifest["files"].items():
            if not is_file_name(name):
                raise self._damaged(f"{path} names {name!r}, which is no file of this folder")
            found = damage(directory / name, expected)
            if found is not None:
                raise self._damaged(f"{directory / name} {found}")
        for problem in self._contradictions():
            raise self._damaged(f"{path}: {problem}")

    def _contradictions(self) -> Iterator[str]:
        """Yield what the manifest says of the shards that its own list of files does not."""
        width, files = np.dtype(self.manifest["dtype"]).itemsize, self.manifest["files"]
        if TOKENIZER not in files:
            yield f"files: has no {TOKENIZER}"
        for split, content in self.manifest["splits"].items():
            counted, stored = (
                sum(one.tokens for one in part) for part in (content["domains"].values(), content["shards"])
            )
            if counted != stored:
                yield f"splits.{split}: its domains have {counted} tokens, its shards {stored}"
            for shard in content["shards"]:
                for name in (shard.tokens_file, shard.documents_file):
                    if name not in files:
                        yield f"splits.{split}: names {name!r}, which is none of its files"
                        return
                size = files[shard.tokens_file]["size"]
                if size != width * shard.tokens:
                    yield f"splits.{split}: {shard.tokens_file}: tokens={shard.tokens}: must be {size // width}"

    def check(self, everything: bool = False) -> None:
        """Read every file that was written to since the last check, and compare checksums and token ids.

        Args:
            everything: whether the other files are read too (about 1 s per gigabyte). A disk can lose bits without a
                write.

        Raises:
            UserError: a file is damaged, or holds a token outside of the vocabulary; names the first such file and the
                offset in it.
        """
        checked = {} if everything else self._checked()
        states: dict[str, int] = {}
        for name, expected in self.manifest["files"].items():
            path = self.directory / name
            states[name] = path.stat().st_ctime_ns
            if checked.get(name) == states[name]:
                continue
            found = None
            if path.suffix == ".tokens":
                found = _foreign_token(path, self.manifest["dtype"], self.manifest["tokenizer"]["vocab_size"])
            found = found or damage_inside(path, expected)
            if found is not None:
                raise self._damaged(f"{path} {found}")
        if states != checked:
            with suppress(OSError):  # a read-only folder is read each time
                write_atomically(self.directory / CHECKED, json.dumps(states).encode())

    def _checked(self) -> dict[str, int]:
        """Return, for each file that was found right, the time of its last change then (ctime in ns)."""
        try:
            return read_json(self.directory / CHECKED, dict[str, int])
        except FileNotFoundError:
            return {}
        except UserError as error:
            rank_zero_info(f"{error}. The prepared data are read and checked anew.")
            return {}

    def counts(self, split: Split) -> Counts:
        """Return the documents, tokens and bytes of a split."""
        return sum(self.domain_counts(split).values(), Counts())

    def domain_counts(self, split: Split) -> dict[str, Counts]:
        """Return the documents, tokens and bytes of each domain of a split."""
        return self._content(split)["domains"]

    def shards(self, split: Split) -> list[Shard]:
        """Return the shards of a split, in order."""
        return self._content(split)["shards"]

    def _content(self, split: Split) -> SplitContent:
        if split not in self.manifest["splits"]:
            raise self._damaged(f"{self.directory / MANIFEST}: splits: has no {split!r}")
        return self.manifest["splits"][split]

    def tokens(self, split: Split) -> ShardedTokens:
        """Return all tokens of a split as one row, memory-mapped, uint16 or uint32."""
        shards = self.shards(split)
        paths = [self.directory / shard.tokens_file for shard in shards]
        return ShardedTokens(paths, [shard.tokens for shard in shards], self.manifest["dtype"])

    def documents(self, split: Split) -> dict[str, list[Any]]:
        """Return `name`, `domain` and `start` (token index of its `<|endoftext|>`) of each document of a split."""
        import pyarrow.parquet

        index: dict[str, list[Any]] = {"name": [], "domain": [], "start": []}
        offset = 0
        for shard in self.shards(split):
            columns = pyarrow.parquet.read_table(self.directory / shard.documents_file).to_pydict()
            index["name"] += columns["name"]
            index["domain"] += columns["domain"]
            index["start"] += [offset + start for start in columns["start"]]
            offset += shard.tokens
        return index

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the tokens were made with."""
        return Tokenizer.load(self.directory / TOKENIZER)

    def text(self, split: Split) -> bytes:
        """Return the text of a split, from its tokens: its documents, one after the other."""
        return self.tokenizer.decode_bytes(self.tokens(split).tolist())

    def _damaged(self, what: str) -> UserError:
        return UserError(f"Prepared data is damaged: {what}. Delete {self.directory} to prepare it anew.")


def _foreign_token(path: Path, dtype: str, vocab_size: int) -> str | None:
    """Return the first token id that is not below `vocab_size`, with its offset in bytes; `None` if there is none."""
    width, start = np.dtype(dtype).itemsize, 0
    for block in blocks(path):
        ids = np.frombuffer(block[: len(block) // width * width], dtype)
        if len(ids) and ids.max() >= vocab_size:
            index = int(np.argmax(ids >= vocab_size))
            return f"holds token {ids[index]} at offset {start + index * width}, but the vocabulary has {vocab_size}"
        start += len(block)
    return None
