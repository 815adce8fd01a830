"""A corpus from the Hugging Face hub, or any folder that `datasets` can load."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_moe.data.corpora import Corpus, Document
from lightning_moe.errors import UserError
from lightning_moe.redaction import redact

LONGEST_REASON = 300  # characters of another library's message


class HubDataset(Corpus):
    """A text column of a data set that `datasets.load_dataset` loads.

    Args:
        name: Name on the hub, such as `HuggingFaceFW/fineweb-edu`, or a local folder of data files.
        config_name: Configuration of the data set, such as `sample-10BT`.
        split: Split to read; validation documents are taken out of it by their hash.
        text_key: Column of the text.
        streaming: Whether training encodes documents while it reads them, in the order of the data set.
        head_documents: Number of documents at the start that, with streaming, give the validation split (by their hash,
            as always) and the text that the tokenizer is trained on.
        max_documents: Largest number of documents that are read.
        revision: Commit, tag or branch on the hub. Prepared data is found again by this name: give a commit to be sure
            that the data is the same.
        domain: Label of the documents.
    """

    def __init__(
        self,
        name: str,
        config_name: str | None = None,
        split: str = "train",
        text_key: str = "text",
        streaming: bool = False,
        head_documents: int = 20_000,
        max_documents: int | None = None,
        revision: str | None = None,
        domain: str = "text",
    ) -> None:
        self.name = name
        self.config_name = config_name
        self.split = split
        self.text_key = text_key
        self.streaming = streaming
        self.head_documents = head_documents
        self.max_documents = max_documents
        self.revision = revision
        self.domain = domain

    def documents(self) -> Iterator[Document]:
        """Yield the rows in their order (with streaming only the head) and leave out rows without text."""
        if self.streaming and self.max_documents is None and Path(self.name).is_dir():
            self._check_each_file()
        count = self.head_documents if self.streaming else None
        for number, row in enumerate(itertools.islice(self.rows(self.load()), count)):
            text = self.text_of(row)
            if text is not None:
                yield Document(f"{self.split}#{number}", text, self.domain)

    def _check_each_file(self) -> None:
        """Read the first row of each file of a folder, so that a bad one does not end the training that reaches it."""
        dataset = self.load()
        for number in range(dataset.num_shards):
            for row in itertools.islice(self.rows(dataset.shard(dataset.num_shards, number)), 1):
                self.text_of(row)

    def rows(self, dataset: Any) -> Iterator[dict[str, Any]]:
        """Yield the rows of what `load` returned.

        Raises:
            UserError: a row cannot be read, such as one of a file with other columns.
        """
        rows = iter(dataset)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # whatever the network, or the reader of a file, raises
                reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
                raise UserError(
                    f"data.corpus: a row of {self.name!r} (split={self.split}) cannot be read: {reason} — all files of "
                    "a data set must have the same columns and types, and the network must stay"
                ) from error
            yield row

    def text_of(self, row: dict[str, Any]) -> str | None:
        """Return the text of a row of `load()`.

        Raises:
            UserError: there is something else in its place.
        """
        if self.text_key not in row:
            raise UserError(f"data.corpus: a row of {self.name!r} has no {self.text_key!r}: it has {sorted(row)}.")
        text = row[self.text_key]
        if text is None or isinstance(text, str):
            return text
        raise UserError(f"data.corpus: {self.text_key!r} of {self.name!r} is {type(text).__name__}, not a string.")

    def fingerprint_fields(self) -> dict[str, object]:
        """Return name, configuration, split and revision as given; for a local folder also its files."""
        from lightning_moe.data.local_files import LocalFiles

        folder = LocalFiles([self.name]).fingerprint_fields()["sha256"] if Path(self.name).is_dir() else None
        return {
            "corpus": "HubDataset",
            "name": redact(self.name) if folder is None else folder,
            "config_name": self.config_name,
            "split": self.split,
            "text_key": self.text_key,
            "max_documents": self.max_documents,
            "revision": self.revision,
            "head_documents": self.head_documents if self.streaming else None,
        }

    def load(self) -> Any:
        """Return the `datasets` object with the text column alone.

        Raises:
            UserError: it cannot be loaded.
        """
        import datasets

        try:
            dataset = datasets.load_dataset(
                self.name, self.config_name, split=self.split, streaming=self.streaming, revision=self.revision
            )
        except Exception as error:  # whatever the hub, the network, the cache or a file's reader raises
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"data.corpus: cannot load {self.name!r} (config_name={self.config_name}, split={self.split}): "
                f"{first_line} — check the names and the network. Without a network, download the files elsewhere and "
                "give their folder as `name`, or read them with LocalFiles."
            ) from None
        columns = dataset.column_names
        if columns is not None and self.text_key not in columns:
            raise UserError(f"data.corpus.text_key={self.text_key!r} is not a column of {self.name!r}: {columns}.")
        if columns is not None:
            dataset = dataset.select_columns([self.text_key])
        if self.max_documents is None:
            return dataset
        return dataset.take(self.max_documents if self.streaming else min(self.max_documents, len(dataset)))
