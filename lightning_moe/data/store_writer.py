"""Writing the files of a token store (see `token_store` for what they hold)."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lightning_moe.atomic import sync
from lightning_moe.data.corpora import Document
from lightning_moe.data.split import Split
from lightning_moe.data.token_store import FORMAT, Counts, Shard, sha256


class ShardWriter:
    """Appends encoded documents to the two files of a shard."""

    def __init__(self, directory: Path, split: Split, number: int, dtype: str, end_of_text_id: int) -> None:
        import pyarrow
        import pyarrow.parquet

        self.tokens_path = directory / f"{split}-{number:05d}.tokens"
        self.documents_path = directory / f"{split}-{number:05d}.documents.parquet"
        self.dtype = dtype
        self.end_of_text_id = end_of_text_id
        self.domains: dict[str, Counts] = {}
        self._schema = pyarrow.schema({"name": "string", "domain": "string", "start": "int64"})
        self._index: Any = pyarrow.parquet.ParquetWriter(self.documents_path, self._schema)
        self._tokens = self.tokens_path.open("wb")
        self._position = 0

    def write(self, documents: Sequence[Document], ids: Sequence[list[int]]) -> None:
        """Append documents with their token ids, each after `<|endoftext|>`."""
        import pyarrow

        rows = []
        for document, document_ids in zip(documents, ids, strict=True):
            tokens = np.array([self.end_of_text_id, *document_ids], self.dtype)
            self._tokens.write(tokens.tobytes())
            rows.append({"name": document.name, "domain": document.domain, "start": self._position})
            self._position += len(tokens)
            counts = Counts(1, len(tokens), len(document.text.encode()))
            self.domains[document.domain] = self.domains.get(document.domain, Counts()) + counts
        self._index.write_table(pyarrow.Table.from_pylist(rows, self._schema))

    def total(self) -> Counts:
        """What has been written so far."""
        return sum(self.domains.values(), Counts())

    def close(self) -> Shard:
        """Finish both files."""
        self._tokens.close()
        self._index.close()
        return Shard(self.tokens_path.name, self.documents_path.name, self._position)


def write_manifest(
    directory: Path,
    fields: dict[str, Any],
    shards: dict[Split, list[Shard]],
    domains: dict[Split, dict[str, Counts]],
) -> None:
    """Write `manifest.json`, with size and checksum of every other file of the folder; sync all to the disk."""
    paths = sorted(directory.iterdir())
    manifest = {
        "format": FORMAT,
        **fields,
        "splits": {
            split: {
                "shards": [asdict(shard) for shard in shards[split]],
                "domains": {domain: asdict(counts) for domain, counts in domains[split].items()},
            }
            for split in shards
        },
        "files": {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in paths},
    }
    manifest_path = directory / "manifest.json"
    manifest_path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*paths, manifest_path, directory):
        sync(path)
