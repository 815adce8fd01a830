"""Check that a checkpoint is whole, without loading it. torch itself does not check the checksums of its files."""

from __future__ import annotations

import zipfile
from pathlib import Path

from lightning_moe import checksums
from lightning_moe.checkpoints import exported
from lightning_moe.checkpoints.files import CHECKSUMS, HEADER, INDEX
from lightning_moe.errors import UserError
from lightning_moe.file_schema import read_json
from lightning_moe.trust import is_file_name


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or `None`.

    Reads every byte of a single file (a zip archive whose parts have checksums) or of a sharded checkpoint, which takes
    about 1 s per gigabyte. Of an export only the sizes are checked.
    """
    if exported.is_exported(path):
        return exported.damage(path)
    if path.is_dir():
        problem = _damaged_file(path)
        if problem is None:
            from lightning_moe.checkpoints import sharded  # torch: seconds

            problem = damage(path / HEADER) or sharded.damage(path)
        return problem
    if path.exists() and not path.is_file():
        return "no regular file"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        return f"truncated or damaged ({error})"
    return None if broken is None else f"damaged: the checksum of its part {broken} is wrong"


def _damaged_file(folder: Path) -> str | None:
    """Return the first file of a sharded checkpoint that has changed, or `None`. Sizes come first, for free."""
    names = (INDEX, HEADER, CHECKSUMS)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        return f"{'no checkpoint' if len(missing) == len(names) else 'incomplete'}: it has no {missing[0]}"
    try:
        written = sorted(read_json(folder / CHECKSUMS, dict[str, checksums.Digest]).items())
        if foreign := next((name for name, _ in written if not is_file_name(name)), None):
            return f"damaged: {CHECKSUMS} names {foreign!r}, which is no file of this folder"
        for look in (checksums.damage, checksums.damage_inside):
            for name, expected in written:
                if (found := look(folder / name, expected)) is not None:
                    return f"damaged: {name} {found}"
    except (OSError, UserError) as error:
        return f"damaged: {error}"
    return None
