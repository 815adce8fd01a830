"""From a corpus to a token store: train the tokenizer, split and encode the documents, publish the folder at once."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

import lightning_moe
from lightning_moe.atomic import sync
from lightning_moe.data.corpora import Corpus, Document
from lightning_moe.data.split import SPLITS, Split, check_split, content_hash, split_of, training_sample
from lightning_moe.data.store_writer import ShardWriter, write_manifest
from lightning_moe.data.token_store import FORMAT
from lightning_moe.data.tokenizer import Tokenizer, TokenizerConfig
from lightning_moe.errors import UserError

BATCH_CHARACTERS = 4 * 2**20


def cache_key(corpus: Corpus, tokenizer: TokenizerConfig, validation_fraction: float) -> str:
    """Hex digest of everything that decides what is in the store; the name of its folder."""
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
) -> None:
    """Make the token store in `directory`, unless it is there.

    Atomic: the folder appears complete or not at all, whatever is killed when. Of several processes that ask for the
    same folder one works and the others wait.

    Raises:
        UserError: unreadable or empty corpus, an empty split, a tokenizer that does not fit, no place to write.
    """
    from filelock import FileLock

    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot create {directory.parent}: {error.strerror}.") from None
    if not os.access(directory.parent, os.W_OK):
        raise UserError(f"data.cache_dir: {directory.parent} is not writable; set another, or LIGHTNING_MOE_CACHE.")
    with FileLock(f"{directory}.lock"):
        if directory.exists():
            return
        unfinished = directory.with_name(directory.name + ".tmp")
        if unfinished.exists():  # of a killed process: the lock is ours
            shutil.rmtree(unfinished)
        unfinished.mkdir()
        try:
            _build(unfinished, corpus, config, validation_fraction, splits)
            os.replace(unfinished, directory)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        sync(directory.parent)


def _build(
    directory: Path, corpus: Corpus, config: TokenizerConfig, validation_fraction: float, splits: tuple[Split, ...]
) -> None:
    started = time.monotonic()
    # Threads of the tokenizer stay on when data loader workers fork later on; those never tokenize.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer = _make_tokenizer(corpus, config, validation_fraction)
    tokenizer.save(directory / "tokenizer.json")

    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    writers = {split: ShardWriter(directory, split, 0, dtype, tokenizer.end_of_text_id) for split in splits}
    smallest, largest = 1.0, 0.0
    for batch in _batches(_progress(corpus.documents(), "Encoding"), BATCH_CHARACTERS):
        for split, writer in writers.items():
            documents = [d for d in batch if split_of(d.text, validation_fraction) == split]
            writer.write(documents, tokenizer.encode_batch([d.text for d in documents]))
        hashes = [content_hash(d.text) for d in batch]
        smallest, largest = min(smallest, *hashes), max(largest, *hashes)
    shards = {split: [writer.close()] for split, writer in writers.items()}
    check_split({s: w.total().documents for s, w in writers.items()}, validation_fraction, (smallest, largest))
    fields = {
        "corpus": corpus.fingerprint_fields(),
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
        "validation_fraction": validation_fraction,
        "dtype": dtype,
        "software": {"lightning_moe": lightning_moe.__version__},
        "seconds": round(time.monotonic() - started, 1),
    }
    write_manifest(directory, fields, shards, {split: writer.domains for split, writer in writers.items()})


def _make_tokenizer(corpus: Corpus, config: TokenizerConfig, validation_fraction: float) -> Tokenizer:
    if config.file is None:
        documents = _progress(corpus.documents(), "Reading")
        sample = training_sample(documents, validation_fraction, config.training_bytes)
        if not sample:
            raise UserError(f"data.corpus: {type(corpus).__name__} has no text to train a tokenizer on.")
        return Tokenizer.train(sample, config.vocab_size)
    tokenizer = Tokenizer.load(config.file)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"data.tokenizer.vocab_size={config.vocab_size} does not match {config.file}, "
            f"which has {tokenizer.vocab_size} tokens. Set vocab_size to {tokenizer.vocab_size}."
        )
    return tokenizer


def _batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Runs of documents of about `size` characters; empty documents are left out."""
    batch: list[Document] = []
    length = 0
    for document in documents:
        if document.text:
            batch.append(document)
            length += len(document.text)
        if length >= size:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _progress(documents: Iterable[Document], title: str) -> Iterator[Document]:
    """The same documents, with a bar that counts characters (on a terminal only)."""
    with tqdm(desc=title, unit=" characters", unit_scale=True, disable=None, leave=False) as bar:
        for document in documents:
            yield document
            bar.update(len(document.text))
