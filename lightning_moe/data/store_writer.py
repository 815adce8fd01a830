"""Writing the files of a token store, shard by shard; `token_store` says what they hold."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from typing_extensions import TypedDict

import lightning_moe
from lightning_moe.atomic import sync, write_atomically
from lightning_moe.checksums import Digest, damage, damage_inside, digest
from lightning_moe.data.encoding import Batch, Encoded, EncodedBatch
from lightning_moe.data.split import Split
from lightning_moe.data.token_store import FORMAT, MANIFEST, TOKENIZER, Counts, Shard
from lightning_moe.errors import UserError
from lightning_moe.file_schema import read_json
from lightning_moe.trust import is_file_name

RECORD = "shard-{:05d}.json"


@dataclass(frozen=True)
class Record:
    """What is known of a finished shard, all splits together; a file of its own until the manifest is written.

    Args:
        size: characters at which shards end.
        read: number of documents that it takes from the corpus, empty ones included.
        characters: characters of text.
        hashes: smallest and largest content hash.
        shards: the shard of each split; a split without documents has none.
        domains: counts of each domain, per split.
        files: checksums of its files by name (`checksums.digest`).
    """

    size: int
    read: Annotated[int, Ge(0)]
    characters: Annotated[int, Ge(0)]
    hashes: tuple[float, float]
    shards: dict[Split, Shard]
    domains: dict[Split, dict[str, Counts]]
    files: dict[str, Digest]

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Read what `save` wrote.

        Raises:
            UserError: the file holds something else.
        """
        saved = read_json(path, _SavedRecord)
        if saved["sha256"] != saved["record"].sha256:
            raise UserError(f"{path}: sha256: is not that of the record")
        return saved["record"]

    def save(self, path: Path) -> None:
        """Write the record, which says by a checksum of its own whether it is what was written."""
        write_atomically(path, json.dumps({"record": asdict(self), "sha256": self.sha256}).encode())

    @property
    def sha256(self) -> str:
        """Hex digest of the record."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()

    def is_whole(self, directory: Path) -> bool:
        """Return whether its files are what was written."""
        named = {name for shard in self.shards.values() for name in (shard.tokens_file, shard.documents_file)}
        return named == self.files.keys() and all(
            is_file_name(name)
            and damage(directory / name, expected) is None
            and damage_inside(directory / name, expected) is None
            for name, expected in self.files.items()
        )


class _SavedRecord(TypedDict):
    record: Record
    sha256: str


class ShardWriter:
    """A writer that appends encoded batches to the files of one shard."""

    def __init__(self, directory: Path, number: int, size: int, splits: tuple[Split, ...]) -> None:
        self.directory = directory
        self.number = number
        self.size = size
        self.parts = {split: _SplitWriter(directory, split, number) for split in splits}
        self.read = self.characters = 0
        self.hashes = (1.0, 0.0)

    def write(self, batch: Batch, encoded: EncodedBatch) -> None:
        """Append a batch. All batches must be of this shard, in order."""
        for split, part in self.parts.items():
            part.write(encoded.splits[split])
        self.read += batch.read
        self.characters += encoded.characters
        self.hashes = (min(self.hashes[0], encoded.hashes[0]), max(self.hashes[1], encoded.hashes[1]))

    def close(self) -> Record:
        """Finish the files and write their record. Files with a record survive a kill."""
        written = {split: part for split, part in self.parts.items() if part.position}
        paths = [path for part in written.values() for path in part.close()]
        for path in paths:
            sync(path)
        record = Record(
            self.size,
            self.read,
            self.characters,
            self.hashes,
            {split: part.shard for split, part in written.items()},
            {split: part.domains for split, part in self.parts.items()},
            {path.name: digest(path) for path in paths},
        )
        record.save(self.directory / RECORD.format(self.number))
        return record

    def abandon(self) -> None:
        """Close the files of a shard that is not finished."""
        for part in self.parts.values():
            if part.position:
                part.close()


class _SplitWriter:
    """The two files of one split of a shard. They begin with the first document."""

    def __init__(self, directory: Path, split: Split, number: int) -> None:
        import pyarrow

        self.tokens_path = directory / f"{split}-{number:05d}.tokens"
        self.documents_path = directory / f"{split}-{number:05d}.documents.parquet"
        self.domains: dict[str, Counts] = {}
        self.position = 0
        self._schema = pyarrow.schema({"name": "string", "domain": "string", "start": "int64"})

    def write(self, encoded: Encoded) -> None:
        import pyarrow
        import pyarrow.parquet

        if not encoded.names:
            return
        if self.position == 0:
            self._index: Any = pyarrow.parquet.ParquetWriter(self.documents_path, self._schema)
            self._tokens = self.tokens_path.open("wb")
        self._tokens.write(encoded.tokens.tobytes())
        starts = self.position + np.cumsum([0, *encoded.lengths[:-1]])
        self._index.write_table(pyarrow.table([encoded.names, encoded.domains, starts], schema=self._schema))
        self.position += len(encoded.tokens)
        for domain, tokens, size in zip(encoded.domains, encoded.lengths, encoded.sizes, strict=True):
            self.domains[domain] = self.domains.get(domain, Counts()) + Counts(1, tokens, size)

    def close(self) -> tuple[Path, Path]:
        self._tokens.close()
        self._index.close()
        return self.tokens_path, self.documents_path

    @property
    def shard(self) -> Shard:
        return Shard(self.tokens_path.name, self.documents_path.name, self.position)


def total(records: list[Record], split: Split) -> dict[str, Counts]:
    """Return the counts of each domain of a split, over all shards."""
    domains: dict[str, Counts] = {}
    for record in records:
        for domain, counts in record.domains[split].items():
            domains[domain] = domains.get(domain, Counts()) + counts
    return domains


def write_manifest(directory: Path, fields: dict[str, Any], records: list[Record], splits: tuple[Split, ...]) -> None:
    """Write the manifest: `fields`, and what the records of the shards say."""
    files = {TOKENIZER: digest(directory / TOKENIZER)}
    for record in records:
        files |= record.files
    manifest = {
        "format": FORMAT,
        **fields,
        "splits": {
            split: {
                "shards": [asdict(record.shards[split]) for record in records if split in record.shards],
                "domains": {domain: asdict(counts) for domain, counts in total(records, split).items()},
            }
            for split in splits
        },
        "software": {"lightning_moe": lightning_moe.__version__},
        "files": files,
    }
    write_atomically(directory / MANIFEST, json.dumps(manifest, indent=1).encode())
