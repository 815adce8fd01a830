"""The analysed text: named domains, read as streams and cut into windows. Memory does not grow with the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_moe.analysis.observe import Batch
from lightning_moe.data import LocalFiles, TextDataModule, Tokenizer
from lightning_moe.data.local_files import kind_of
from lightning_moe.errors import UserError
from lightning_moe.user_paths import user_path

#: Number of characters of a plain text file that are encoded at a time, plus the rest of the line, at most as many
#: again. In a longer line the cut splits a word in two.
PIECE_CHARACTERS = 2**20


@dataclass(frozen=True)
class Domain:
    """A kind of text.

    Args:
        name: name in the figures.
        source: origin, for the report.
        documents: function that gives the token ids piece by piece; every document begins with ``<|endoftext|>``.
    """

    name: str
    source: str
    documents: Callable[[], Iterator[Sequence[int]]]


def held_out_domains(data: TextDataModule) -> list[Domain]:
    """Return the domains of a run's validation text (of the default corpus: code and prose)."""
    index = data.store.documents("validation")
    tokens = data.store.tokens("validation")
    ends = [*index["start"][1:], len(tokens)]

    def documents(domain: str) -> Callable[[], Iterator[Sequence[int]]]:
        spans = [span[:2] for span in zip(index["start"], ends, index["domain"], strict=True) if span[2] == domain]
        return lambda: (tokens[start:end].tolist() for start, end in spans)

    source = f"validation text of {data.corpus.kind}"
    sizes: dict[str, int] = {}
    for start, end, name in zip(index["start"], ends, index["domain"], strict=True):
        sizes[name] = sizes.get(name, 0) + end - start
    return [Domain(name, source, documents(name)) for name, size in sizes.items() if size > 1]  # else only empty texts


def file_domain(name: str, path: str, tokenizer: Tokenizer) -> Domain:
    """Make a domain of a user's file (plain text, ``.jsonl``, ``.parquet``), folder or glob.

    Raises:
        UserError: no file is found. A file that turns out to be unreadable raises it later, while it is read.
    """
    file = user_path(path, "--text")
    plain = file.is_file() and kind_of(file) == "text"
    if not plain:
        try:
            LocalFiles({name: [path]}).fingerprint_fields()  # are there files, and can they be read?
        except UserError as error:
            given = path if name == file.stem else f"{name}={path}"
            raise UserError(f"--text {given}: {str(error).removeprefix('data.corpus.paths: ')}") from None

    def documents() -> Iterator[Sequence[int]]:
        if plain:
            yield [tokenizer.end_of_text_id]
            yield from (tokenizer.encode(piece) for piece in _pieces(name, file))
            return
        for document in LocalFiles({name: [path]}).documents():
            yield [tokenizer.end_of_text_id, *tokenizer.encode(document.text)]

    return Domain(name, path, documents)


def _pieces(name: str, path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while piece := file.read(PIECE_CHARACTERS):
                yield piece + file.readline(PIECE_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        given = path if name == path.stem else f"{name}={path}"
        reason = f"is not UTF-8 text: {error}" if isinstance(error, UnicodeDecodeError) else error
        raise UserError(f"--text {given}: {reason}") from None


def windows(domain: Domain, sequence_length: int, max_tokens: int | None) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (input ids, labels) of consecutive windows of ``sequence_length``; each token but the first is one label.

    The last window is padded (input 0, label −100). There are at most ``max_tokens`` labels.
    """
    left = max_tokens
    buffer: list[int] = []
    for ids in domain.documents():
        buffer += ids
        start = 0
        while len(buffer) - start > sequence_length and (left is None or left >= sequence_length):
            end = start + sequence_length
            yield buffer[start:end], buffer[start + 1 : end + 1]
            start, left = end, None if left is None else left - sequence_length
        buffer = buffer[start:]
        if left is not None and left < min(sequence_length, len(buffer)):
            break  # enough tokens; nothing more is read
    count = min(len(buffer) - 1, sequence_length if left is None else left)
    if count > 0:
        padding = sequence_length - count
        yield buffer[:count] + [0] * padding, buffer[1 : count + 1] + [-100] * padding


def batches(
    domains: Sequence[Domain], sequence_length: int, batch_size: int, max_tokens: int | None
) -> Iterator[Batch]:
    """Yield windows of all domains alternately, so that a batch is a mixture as long as all domains last.

    Args:
        domains: domains, at least one.
        sequence_length: tokens S of a window.
        batch_size: number of sequences in a batch; the last batch may have fewer.
        max_tokens: largest number of tokens of each domain; `None` for all.

    Raises:
        UserError: a domain has no text.
    """
    streams = {index: windows(domain, sequence_length, max_tokens) for index, domain in enumerate(domains)}
    empty = set(streams)
    rows: list[tuple[list[int], list[int], int]] = []
    while streams:
        for index in list(streams):
            window = next(streams[index], None)
            if window is None:
                if index in empty:
                    raise UserError(
                        f"domain {domains[index].name} ({domains[index].source}): there is no text to analyse."
                    )
                del streams[index]
                continue
            empty.discard(index)
            rows.append((*window, index))
            if len(rows) == batch_size:
                yield _batch(rows)
                rows = []
    if rows:
        yield _batch(rows)


def _batch(rows: Sequence[tuple[list[int], list[int], int]]) -> Batch:
    inputs, labels, domains = (torch.tensor(column, dtype=torch.int64) for column in zip(*rows, strict=True))
    return Batch(inputs, labels, domains)
