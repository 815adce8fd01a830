"""Whether a checkpoint is whole, without loading it: torch does not look at its file's checksums."""

from __future__ import annotations

import zipfile
from pathlib import Path

from lightning_moe.checkpoints import exported

INDEX, HEADER = ".metadata", "meta.pt"  # of a sharded checkpoint, which is a folder


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or null.

    Reads all of a single file (a zip archive whose parts have checksums; about 1 s a gigabyte). Of a sharded checkpoint
    and of an export only the parts that have checksums are read, and of the others their size.
    """
    if exported.is_exported(path):
        return exported.damage(path)
    if path.is_dir():
        missing = [name for name in (INDEX, HEADER) if not (path / name).is_file()]
        if missing:
            return f"incomplete: it has no {missing[0]}"
        from lightning_moe.checkpoints import sharded  # torch: seconds

        return damage(path / HEADER) or sharded.damage(path)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        return f"truncated or damaged ({error})"
    return None if broken is None else f"damaged: the checksum of its part {broken} is wrong"
