"""Encoding documents to token ids, in this process or in several, always in the same order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_moe.data.corpora import Document
from lightning_moe.data.split import Split, content_hash, split_of
from lightning_moe.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 2**20


class Batch(NamedTuple):
    """Documents that are encoded together.

    Args:
        shard: number of the shard that they belong to.
        documents: the documents that have text.
        read: number of documents that were taken from the corpus, empty ones included.
    """

    shard: int
    documents: list[Document]
    read: int


@dataclass(frozen=True)
class Encoded:
    """The documents of a batch that belong to one split.

    Args:
        tokens: ids [sum of lengths]; every document begins with `<|endoftext|>`.
        names: name of each document.
        domains: domain of each document.
        lengths: tokens of each document, `<|endoftext|>` included.
        sizes: bytes of text of each document.
    """

    tokens: np.ndarray
    names: list[str]
    domains: list[str]
    lengths: list[int]
    sizes: list[int]


@dataclass(frozen=True)
class EncodedBatch:
    """A batch, encoded.

    Args:
        splits: the documents of each split.
        characters: characters of text.
        hashes: smallest and largest content hash.
    """

    splits: dict[Split, Encoded]
    characters: int
    hashes: tuple[float, float]


class Encoder:
    """A callable that splits and encodes documents."""

    def __init__(self, tokenizer: Tokenizer, dtype: str, validation_fraction: float, splits: tuple[Split, ...]) -> None:
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.validation_fraction = validation_fraction
        self.splits = splits

    def __call__(self, documents: Sequence[Document]) -> EncodedBatch:
        sides = [split_of(document.text, self.validation_fraction) for document in documents]
        encoded = {
            split: self._encode([d for d, side in zip(documents, sides, strict=True) if side == split])
            for split in self.splits
        }
        hashes = [content_hash(document.text) for document in documents]
        return EncodedBatch(encoded, sum(len(d.text) for d in documents), (min(hashes), max(hashes)))

    def _encode(self, documents: Sequence[Document]) -> Encoded:
        first = self.tokenizer.end_of_text_id
        rows = [[first, *ids] for ids in self.tokenizer.encode_batch([d.text for d in documents])]
        return Encoded(
            np.concatenate([np.empty(0, self.dtype), *(np.array(row, self.dtype) for row in rows)]),
            [d.name for d in documents],
            [d.domain for d in documents],
            [len(row) for row in rows],
            [len(d.text.encode()) for d in documents],
        )


def cut(documents: Iterable[Document], shard: int, shard_size: int) -> Iterator[Batch]:
    """Yield batches of about a million characters; no batch has documents of two shards.

    A shard ends with the document that brings it to `shard_size` characters, so the corpus alone decides where.

    Args:
        documents: Documents from the first one of the first shard on.
        shard: Number of that shard.
        shard_size: Characters in a shard.
    """
    batch: list[Document] = []
    read = in_batch = in_shard = 0
    for document in documents:
        read += 1
        if document.text:
            batch.append(document)
            in_batch += len(document.text)
            in_shard += len(document.text)
        if in_batch >= BATCH_CHARACTERS or in_shard >= shard_size:
            yield Batch(shard, batch, read)
            batch, read, in_batch = [], 0, 0
        if in_shard >= shard_size:
            shard, in_shard = shard + 1, 0
    if batch:
        yield Batch(shard, batch, read)


def encode_all(
    batches: Iterable[Batch], encoder: Encoder, file: Path, workers: int
) -> Generator[tuple[Batch, EncodedBatch], None, None]:
    """Yield each batch with its encoding, in order.

    Args:
        batches: Batches, read as results are taken; at most two for each process are in memory.
        encoder: Encoder of this process; each worker builds its own like it.
        file: File of the tokenizer.
        workers: Number of processes; 0 means this one, where the tokenizer's own threads share the work.

    Raises:
        BrokenProcessPool: one of the workers was killed.
    """
    if workers == 0:
        for batch in batches:
            yield batch, encoder(batch.documents)
        return
    # This process has threads, so we do not fork it. The server imports once, and its children share that memory.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(
        workers, context, _start_worker, (file, encoder.dtype, encoder.validation_fraction, encoder.splits)
    )
    try:
        pending: deque[tuple[Batch, Future[EncodedBatch]]] = deque()
        for batch in batches:
            pending.append((batch, pool.submit(_encode_here, batch.documents)))
            if len(pending) == 2 * workers:
                batch, future = pending.popleft()
                yield batch, future.result()
        while pending:
            batch, future = pending.popleft()
            yield batch, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None


def _start_worker(file: Path, dtype: str, validation_fraction: float, splits: tuple[Split, ...]) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _encoder = Encoder(Tokenizer.load(file), dtype, validation_fraction, splits)


def _die_with_parent() -> None:
    """End this worker when its parent ends. A worker of a killed parent would otherwise wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_here(documents: Sequence[Document]) -> EncodedBatch:
    assert _encoder is not None
    return _encoder(documents)
