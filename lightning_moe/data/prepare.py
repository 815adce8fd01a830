"""From a corpus to a token store: train the tokenizer, split and encode the documents, publish the whole folder."""

import errno
import hashlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from lightning_moe.atomic import sync
from lightning_moe.data.corpora import Corpus, Document
from lightning_moe.data.encoding import Encoder, cut, encode_all
from lightning_moe.data.split import SPLITS, Split, check_split, training_sample
from lightning_moe.data.store_writer import RECORD, Record, ShardWriter, total, write_manifest
from lightning_moe.data.token_store import FORMAT, MANIFEST, TOKENIZER
from lightning_moe.data.tokenizer import Tokenizer, TokenizerConfig
from lightning_moe.errors import UserError
from lightning_moe.file_locks import take_lock

CACHE_VARIABLE = "LIGHTNING_MOE_CACHE"
SHARD_SIZE = 2**27
"""Characters of text in a shard: this much work a kill can cost."""


def cache_key(corpus: Corpus, tokenizer: TokenizerConfig, validation_fraction: float) -> str:
    """Return the hex digest of everything that decides what is in the store; it is the name of the store's folder."""
    fields = {
        "format": FORMAT,
        "corpus": corpus.fingerprint_fields(),
        "tokenizer": tokenizer.fingerprint_fields(),
        "validation_fraction": validation_fraction,
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def prepare(
    directory: Path,
    corpus: Corpus,
    config: TokenizerConfig,
    validation_fraction: float,
    splits: tuple[Split, ...] = SPLITS,
    workers: int = 0,
    shard_size: int = SHARD_SIZE,
) -> None:
    """Make the token store in `directory`, unless it exists.

    The folder appears complete or not at all, whatever is killed and when. Shards that were finished before a kill
    stay in `<directory>.tmp`, and the next call continues after them. What is written depends on the corpus and the
    settings (and where shards end, on `shard_size`), never on `workers` or on kills. If several processes ask for the
    same folder, one works and the others wait.

    Args:
        directory: Folder of the store; see `cache_key`.
        corpus: The documents.
        config: The tokenizer.
        validation_fraction: Share of the documents that is held out.
        splits: Splits that are written.
        workers: Number of processes that encode; 0 means this one, with the threads of the tokenizer's library.
        shard_size: Characters of text in a shard. It does not change what training reads.

    Raises:
        UserError: the corpus is unreadable or empty, a split is empty, the tokenizer does not fit, there is no place
            to write, or a worker was killed.
    """
    if directory.exists():  # it is complete, and perhaps for reading only
        return
    with _alone(directory) as unfinished:
        if unfinished is None:
            return
        try:
            if not (unfinished / MANIFEST).exists():
                tokenizer = _make_tokenizer(unfinished, corpus, config, validation_fraction)
                _write(unfinished, corpus, tokenizer, validation_fraction, splits, workers, shard_size)
        except UserError:  # the corpus or the settings have to change, and these shards are useless then
            shutil.rmtree(unfinished)
            raise
        except BrokenProcessPool:
            raise UserError(
                f"A worker process was killed, perhaps because memory ran out (--workers={workers}). "
                f"Finished shards are kept in {unfinished}: run the command again, with fewer workers."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{error.strerror}: {unfinished}. Finished shards are kept there: make room and run the command again."
            ) from None
        for record in _record_files(unfinished):
            record.unlink()
        try:
            os.replace(unfinished, directory)
        except OSError:
            if not directory.exists():  # without locks another process may be faster
                raise
        sync(directory.parent)


@contextmanager
def _alone(directory: Path) -> Iterator[Path | None]:
    """Wait for other processes that make the folder; give the unfinished one, or `None` if another made it.

    On a file system without locks each process works in an unfinished folder of its own, which does not outlive it.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(f"{directory}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write in {directory.parent}: {error.strerror}; set another, or {CACHE_VARIABLE}."
        ) from None
    try:
        locked = take_lock(lock, directory, wait=True)
        own = "" if locked else f".{socket.gethostname()}-{os.getpid()}"
        unfinished = directory.with_name(f"{directory.name}{own}.tmp")
        if directory.exists():
            yield None
            return
        unfinished.mkdir(exist_ok=True)
        try:
            yield unfinished
        finally:
            if not locked:
                shutil.rmtree(unfinished, ignore_errors=True)
    finally:
        os.close(lock)


def _write(
    directory: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    validation_fraction: float,
    splits: tuple[Split, ...],
    workers: int,
    shard_size: int,
) -> None:
    """Encode the documents after the finished shards, then write the manifest."""
    # The tokenizer's threads stay when data loader workers fork later. Those workers never tokenize.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    records = _finished(directory, shard_size)
    if records:
        rank_zero_info(f"Continuing after {len(records)} finished shards.")
    source = corpus.fingerprint_fields()
    documents = itertools.islice(corpus.documents(), sum(record.read for record in records), None)
    encoder = Encoder(tokenizer, dtype, validation_fraction, splits)
    batches = encode_all(cut(documents, len(records), shard_size), encoder, directory / TOKENIZER, workers)
    size = source.get("bytes")
    bar = tqdm(
        desc="Encoding",
        total=size if isinstance(size, int) else None,
        initial=sum(counts.bytes for split in splits for counts in total(records, split).values()),
        unit="B",
        unit_scale=True,
        disable=None,
        leave=False,
    )
    writer: ShardWriter | None = None
    with bar, closing(batches):
        try:
            for batch, encoded in batches:
                if writer is None or batch.shard != writer.number:
                    if writer is not None:
                        records.append(writer.close())
                    writer = ShardWriter(directory, batch.shard, shard_size, splits)
                writer.write(batch, encoded)
                bar.update(sum(size for part in encoded.splits.values() for size in part.sizes))
        except BaseException:
            if writer is not None:
                writer.abandon()
            raise
        if writer is not None:
            records.append(writer.close())
    documents_of = {split: sum(c.documents for c in total(records, split).values()) for split in splits}
    lowest, highest = zip(*(record.hashes for record in records), strict=True) if records else ((1.0,), (0.0,))
    check_split(documents_of, validation_fraction, (min(lowest), max(highest)))
    fields = {
        "corpus": source,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
        "validation_fraction": validation_fraction,
        "dtype": dtype,
    }
    write_manifest(directory, fields, records, splits)


def _finished(directory: Path, shard_size: int) -> list[Record]:
    """Return the shards that an earlier process finished, from the first one on, and remove everything else."""
    records: list[Record] = []
    for number, path in enumerate(_record_files(directory)):
        try:
            record = Record.load(path)
        except UserError as error:
            rank_zero_info(f"{error}. This shard and those after it are made anew.")
            break
        if path.name != RECORD.format(number) or record.size != shard_size or not record.is_whole(directory):
            break
        records.append(record)
    kept = {TOKENIZER, *(RECORD.format(i) for i in range(len(records))), *(f for r in records for f in r.files)}
    for path in directory.iterdir():
        if path.name not in kept:
            path.unlink()
    return records


def _record_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("shard-*.json"))


def _make_tokenizer(directory: Path, corpus: Corpus, config: TokenizerConfig, validation_fraction: float) -> Tokenizer:
    """Return the tokenizer, saved in `directory`; one that was trained there before is used again."""
    path = directory / TOKENIZER
    if path.exists():
        try:
            return Tokenizer.load(path)
        except UserError as error:  # a power cut; the shards that were made with it, if any, are its own again
            rank_zero_info(f"{error} It is made anew.")
    tokenizer = _train_or_load(corpus, config, validation_fraction)
    tokenizer.save(path)
    return tokenizer


def _train_or_load(corpus: Corpus, config: TokenizerConfig, validation_fraction: float) -> Tokenizer:
    if config.file is None:
        documents = _progress(corpus.documents(), "Reading")
        sample = training_sample(documents, validation_fraction, config.training_bytes)
        if not sample:
            raise UserError(f"data.corpus: {corpus.kind} has no text to train a tokenizer on.")
        return Tokenizer.train(sample, config.vocab_size)
    tokenizer = Tokenizer.load(config.file)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"data.tokenizer.vocab_size={config.vocab_size} does not match {config.file}, "
            f"which has {tokenizer.vocab_size} tokens. Set vocab_size to {tokenizer.vocab_size}."
        )
    return tokenizer


def _progress(documents: Iterable[Document], title: str) -> Iterator[Document]:
    """Yield the same documents, with a progress bar that counts bytes of text (on a terminal only)."""
    with tqdm(desc=title, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for document in documents:
            yield document
            bar.update(len(document.text.encode()))
