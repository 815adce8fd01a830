"""Which documents are held out, and which of the others train the tokenizer."""

import hashlib
import heapq
from collections.abc import Iterable
from typing import Literal

from lightning_moe.data.corpora import Document
from lightning_moe.errors import UserError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


def content_hash(text: str) -> float:
    """Return a uniform number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48


def split_of(text: str, validation_fraction: float) -> Split:
    """Return the split of a document, by its content.

    So exact copies (vendored files, mirrors) are never in both splits, and no document changes its split when others
    come or go. Near copies can be in both.
    """
    return "validation" if content_hash(text) < validation_fraction else "train"


def check_split(documents: dict[Split, int], validation_fraction: float, extremes: tuple[float, float]) -> None:
    """Raise `UserError` if a split has no documents.

    Args:
        documents: number of documents of each split.
        validation_fraction: share that is held out.
        extremes: smallest and largest content hash.
    """
    total = sum(documents.values())
    if total == 1:
        raise UserError(
            "data.corpus: there is one document only, but training and validation need different ones. Give more "
            "files, or set the separator of LocalFiles to split a file into documents."
        )
    for split, count in documents.items():
        if count == 0:
            wanted = f"above {extremes[0]:.4f}" if split == "validation" else f"below {extremes[1]:.4f}"
            raise UserError(
                f"data.validation_fraction={validation_fraction}: none of the {total} documents is in the {split} "
                f"split. It gets its first one {wanted}."
            )


def training_sample(documents: Iterable[Document], validation_fraction: float, max_bytes: int) -> list[str]:
    """Return the training texts with the smallest content hashes, `max_bytes` together at most (but at least one).

    The result depends on the set of documents, not on their order. Only the sample is held in memory.
    """
    heap: list[tuple[float, str]] = []  # by descending hash
    total = 0
    end = 1.0  # what is here or later in the order of hashes does not fit
    for document in documents:
        position = content_hash(document.text)
        if document.text and validation_fraction <= position < end:
            heapq.heappush(heap, (-position, document.text))
            total += len(document.text.encode())
            while total > max_bytes and len(heap) > 1:
                negative, text = heapq.heappop(heap)
                total -= len(text.encode())
                end = -negative
    return [text for _, text in sorted(heap)]
