"""The files that folders and globs name: each once, and nothing is left out in silence."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lightning_moe.errors import UserError
from lightning_moe.file_schema import refuse_special
from lightning_moe.user_paths import user_path

KEY = "data.corpus.paths"


@dataclass
class Found:
    """What folders and globs name.

    Args:
        files: the files, sorted within each folder or glob.
        linked: linked folders that are read.
        left_out: what is not read, with the reason.
    """

    files: list[Path] = field(default_factory=list)
    linked: list[Path] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)

    def say(self) -> None:
        """Print what is left out, and which links are followed, once in this process."""
        if self.linked:
            _say(f"Linked folders are read too: {', '.join(map(str, self.linked))}")
        by_reason: dict[str, list[str]] = {}
        for path, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(str(path))
        for reason, names in by_reason.items():
            say_left_out(names, reason)


def say_left_out(names: Iterable[str], reason: str) -> None:
    """Print the names of files that are not read, and the reason; the same line once in a process, on rank 0."""
    _say(f"Left out, {reason}: {', '.join(names)}")


@cache
def _say(line: str) -> None:
    rank_zero_info(line)


def find_files(pattern: str) -> Found:
    """Find the files of a folder or glob, or one file.

    Linked folders are read too, but no folder twice, so that a link to a folder above is no endless corpus.

    Args:
        pattern: path of a file or folder, or a glob; ``**`` means any number of folders. Hidden files and folders are
            left out, unless the pattern names them.

    Raises:
        UserError: a folder cannot be read, or there is no file.
    """
    path, found = Path(os.path.abspath(user_path(pattern, KEY))), Found()
    if path.is_dir():
        root, names = path, _files_below(path, found)
    elif path.exists():
        refuse_special(path, f"{KEY}: {path}")
        return Found([path])
    else:
        fixed = next((i for i, part in enumerate(path.parts) if _is_magic(part)), len(path.parts) - 1)
        root = Path(*path.parts[:fixed])
        names = _matching(root, path.parts[fixed:], found) if root.is_dir() else iter(())
    _keep_each_once(root, sorted(set(names)), found)
    if not found.files:
        left_out = "".join(f"; left out: {path} ({reason})" for path, reason in found.left_out.items())
        raise UserError(f"{KEY}: no file matches {path}{left_out}.")
    return found


def _keep_each_once(root: Path, paths: Iterable[Path], found: Found) -> None:
    """Keep regular files, and of several links to one file the path without links."""
    real_root, kept = os.path.realpath(root), dict[str, Path]()
    places = {path: os.path.realpath(path) for path in paths}
    linked = {path: place != os.path.join(real_root, path.relative_to(root)) for path, place in places.items()}
    for path in sorted(places, key=lambda path: (linked[path], path)):
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise UserError(f"{path}: {error.strerror}.") from None
            found.left_out[path] = "because the link leads nowhere"
        else:
            if stat.S_ISDIR(mode):
                continue
            if not stat.S_ISREG(mode):
                found.left_out[path] = "because it is no regular file"
            elif kept.setdefault(places[path], path) != path:
                found.left_out[path] = f"because it is a link to {kept[places[path]]}"
    found.files = sorted(kept.values())


def _files_below(folder: Path, found: Found) -> Iterator[Path]:
    for inside in _folders_below(folder, found):
        entries = (entry for entry in _entries(inside) if not _is_folder(entry))
        yield from (inside / entry.name for entry in entries if not _is_hidden(inside, entry, found))


def _folders_below(folder: Path, found: Found) -> list[Path]:
    """Return a folder and those below it, each once: first those without a link, then linked ones."""
    seen: set[str] = set()
    folders, waiting, links = [], [folder], list[Path]()
    while waiting or links:
        is_link = not waiting
        path = links.pop(0) if is_link else waiting.pop()
        place = os.path.realpath(path)
        if place in seen:
            found.left_out[path] = "because it is a link to a folder that is read already"
            continue
        if is_link:
            found.linked.append(path)
        seen.add(place)
        folders.append(path)
        for entry in _entries(path):
            if _is_folder(entry) and not _is_hidden(path, entry, found):
                (links if entry.is_symlink() else waiting).append(path / entry.name)
    return folders


def _matching(folder: Path, parts: tuple[str, ...], found: Found) -> Iterator[Path]:
    """Yield what matches the parts of a glob below a folder."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        for inside in _folders_below(folder, found):
            yield from _matching(inside, rest or ("*",), found)
        return
    if not _is_magic(part):
        names = [part] if os.path.lexists(folder / part) else []
    else:
        matching = [entry for entry in _entries(folder) if fnmatchcase(entry.name, part)]
        named = part.startswith(".")
        names = [entry.name for entry in matching if named or not _is_hidden(folder, entry, found)]
    for name in names:
        if not rest:
            yield folder / name
        elif (folder / name).is_dir():
            yield from _matching(folder / name, rest, found)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name."""
    try:
        with os.scandir(folder) as opened:
            return sorted(opened, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{KEY}: the folder {folder} cannot be read: {error.strerror}.") from None


def _is_hidden(folder: Path, entry: os.DirEntry[str], found: Found) -> bool:
    """Return whether an entry is hidden, and note it as left out."""
    if entry.name.startswith("."):
        found.left_out[folder / entry.name] = "because it is hidden"
    return entry.name.startswith(".")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_magic(part: str) -> bool:
    return any(character in part for character in "*?[")
