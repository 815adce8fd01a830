"""Checksums that say whether a file is what was written, and if not, where it differs."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from annotated_types import Interval
from typing_extensions import TypedDict

BLOCK = 2**20


class Digest(TypedDict):
    """What is written down of a file: size in bytes, SHA-256, and CRC-32 of each MiB, as `digest` returns it."""

    size: Annotated[int, Interval(ge=0, lt=2**62)]
    sha256: str
    crc32: str


def digest(path: Path) -> Digest:
    """Return size in bytes, SHA-256, and the CRC-32 of each MiB (8 hex digits each), which locates a damage."""
    whole, parts = hashlib.sha256(), []
    for block in blocks(path):
        whole.update(block)
        parts.append(f"{zlib.crc32(block):08x}")
    return {"size": path.stat().st_size, "sha256": whole.hexdigest(), "crc32": "".join(parts)}


def damage(path: Path, expected: Digest) -> str | None:
    """Return what is wrong with a file's size, with the offset; `None` if it is right. No byte is read."""
    if not path.exists():
        return "is missing"
    if not path.is_file():  # a pipe would never end
        return "is no regular file"
    size = path.stat().st_size
    if size == expected["size"]:
        return None
    where = f"it ends at offset {size}" if size < expected["size"] else f"something follows offset {expected['size']}"
    return f"is {size} bytes long, not {expected['size']}: {where}"


def damage_inside(path: Path, expected: Digest) -> str | None:
    """Return what is wrong with a file's content, with the offset; `None` if it is right. Every byte is read."""
    found = digest(path)
    if found["sha256"] == expected["sha256"]:
        return None
    pairs = zip(found["crc32"], expected["crc32"], strict=False)
    number = next((i for i, (a, b) in enumerate(pairs) if a != b), 0) // 8
    end = min((number + 1) * BLOCK, found["size"])
    return f"does not match its checksum: offsets {number * BLOCK} to {end} have changed"


def blocks(path: Path) -> Iterator[bytes]:
    """Yield the content of a file, one MiB at a time."""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block
