"""Encoded tokens on disk: one folder per corpus, tokenizer and split, read through memory maps.

    manifest.json               counts, checksums, versions; written last
    tokenizer.json
    train-00000.tokens          uint16 or uint32, little-endian: every document is <|endoftext|> and its tokens
    train-00000.documents.parquet   name, domain, start (token index in this shard) of each document
    validation-00000.…

The folder appears under its final name only when it is complete (see `prepare`).
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lightning_moe.data.split import Split
from lightning_moe.data.tokenizer import Tokenizer
from lightning_moe.errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """A run of whole documents: their tokens, and the index of where each starts."""

    tokens_file: str
    documents_file: str
    tokens: int


@dataclass(frozen=True)
class Counts:
    """Size of a split or of one of its domains. `bytes` are bytes of text, without special tokens."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.documents + other.documents, self.tokens + other.tokens, self.bytes + other.bytes)


class TokenStore:
    """A prepared folder, opened for reading.

    Raises `UserError`, naming the file, if something is missing or has another size than it was written with.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "manifest.json"
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"No prepared data in {directory}: prepare_data() has to run first.") from None
        except ValueError as error:
            raise self._damaged(path, f"not JSON: {error}") from None
        for name, expected in self.manifest["files"].items():
            file = directory / name
            size = file.stat().st_size if file.exists() else None
            if size != expected["size"]:
                found = "missing" if size is None else f"{size} bytes long, not {expected['size']}"
                raise self._damaged(file, found)

    def verify_checksums(self) -> None:
        """Read every file and compare it with its SHA-256 (about 1 s a gigabyte). Raises `UserError`."""
        for name, expected in self.manifest["files"].items():
            if sha256(self.directory / name) != expected["sha256"]:
                raise self._damaged(self.directory / name, "changed since it was written (checksum)")

    def counts(self, split: Split) -> Counts:
        """Documents, tokens and bytes of a split."""
        return sum(self.domain_counts(split).values(), Counts())

    def domain_counts(self, split: Split) -> dict[str, Counts]:
        """Documents, tokens and bytes of each domain of a split."""
        return {domain: Counts(**counts) for domain, counts in self.manifest["splits"][split]["domains"].items()}

    def tokens_path(self, split: Split) -> Path:
        """The split's token file (one shard for now; the manifest can list several)."""
        return self.directory / self._shard(split).tokens_file

    def tokens(self, split: Split) -> np.ndarray:
        """All tokens of a split, memory-mapped, uint16 or uint32 [tokens]."""
        return map_tokens(self.tokens_path(split), self.manifest["dtype"])

    def documents(self, split: Split) -> dict[str, list[Any]]:
        """The index of a split: `name`, `domain` and `start` (token index of its <|endoftext|>) of each document."""
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(self.directory / self._shard(split).documents_file)
        return dict(table.to_pydict())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the tokens were made with."""
        return Tokenizer.load(self.directory / "tokenizer.json")

    def text(self, split: Split) -> bytes:
        """The text behind the tokens of a split: its documents, one after the other."""
        return self.tokenizer.decode_bytes(self.tokens(split).tolist())

    def _shard(self, split: Split) -> Shard:
        (shard,) = self.manifest["splits"][split]["shards"]
        return Shard(**shard)

    def _damaged(self, path: Path, what: str) -> UserError:
        return UserError(f"Prepared data is damaged: {path} is {what}. Delete {self.directory} to prepare it anew.")


def map_tokens(path: Path, dtype: str) -> np.ndarray:
    """A token file, memory-mapped."""
    # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
