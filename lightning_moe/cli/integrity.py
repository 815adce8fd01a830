"""Whether a checkpoint is whole, without loading it: torch does not look at its file's checksums."""

from __future__ import annotations

import zipfile
from pathlib import Path

METADATA = (".metadata", "meta.pt")  # of a sharded checkpoint, which is a folder


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or null.

    Reads all of a single file (a zip archive whose parts have checksums; about 1 s a gigabyte). Of a sharded checkpoint
    only the parts that have checksums are read.
    """
    if path.is_dir():
        missing = [name for name in METADATA if not (path / name).is_file()]
        return f"{missing[0]} is missing in it" if missing else damage(path / METADATA[1])
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        return f"truncated or damaged ({error})"
    return None if broken is None else f"damaged: the checksum of its part {broken} is wrong"
