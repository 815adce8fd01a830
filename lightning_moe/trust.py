"""What a file of somebody else may decide, and what it may not (docs/trust.md).

A name that becomes a file's name is plain, and what a folder's files name stays inside of that folder. The
configuration in a run's folder is used without being typed. So it chooses which code runs, where files go and which
server gets data only if this user wrote it: `remember` keeps a line about each such configuration in `known_file`.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_moe.errors import UserError
from lightning_moe.filenames import CONFIG_FILE

LONGEST_NAME = 200  # of the 255 bytes that a file system takes; the rest is for suffixes
_NAME = re.compile(r"[A-Za-z0-9_][\w.+=,-]*", re.ASCII)
_PLACES = ("data.cache_dir", "tracking.tracking_uri")
_CLASS_KEYS = ("model.routing", "data.corpus")  # with text as value, the name of a class of ours
_CLASSES = ("lightning_moe.", "lightning.pytorch.")  # what their arguments name is looked at by itself


def check_name(name: str, key: str) -> str:
    """Return a name if a file or folder can have it: plain, and no path.

    Args:
        name: name that somebody typed, or that a file holds.
        key: key or option of the name, with its file, for the message.

    Raises:
        UserError: it is not plain, or too long.
    """
    if not _NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise UserError(
            f"{key}={name!r}: must be a plain folder name of letters, digits and . _ - + = , "
            f"({LONGEST_NAME} characters at most)"
        )
    return name


def is_file_name(name: Any) -> bool:
    """Return whether something that a file holds is the name of a file in the same folder, and not a path."""
    return isinstance(name, str) and "\0" not in name and name not in ("", ".", "..") and Path(name).name == name


def stays_inside(folder: Path, path: Path | str) -> bool:
    """Return whether a path, relative to a folder, lies in it after all links are followed."""
    try:
        return (folder / path).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a circle of links, or no path at all
        return False


def check_stored_config(text: str, config: Mapping[str, Any], run_dir: Path) -> None:
    """Refuse the configuration of a run's folder if it decides what only its user may, and this user did not write it.

    Somebody else's may have the same text, which then decides nothing new. So it says nothing about links
    (`refuse_links_out`).

    Args:
        text: content of the run's ``config.yaml``, see `config_fact`.
        config: the same, parsed.
        run_dir: folder of the run.

    Raises:
        UserError: naming the first such key.
    """
    if is_known(config_fact(text)):
        return
    file = run_dir / CONFIG_FILE
    for key, value in _deciding(config):
        raise UserError(
            f"{file}: {key}={value!r}: this file was not written by you on this machine, so it does not decide which "
            f"code runs and where files and data go. If it is right, name it: --config {file}"
        )


def refuse_links_out(folder: Path, instead: str) -> None:
    """Refuse to write to a folder with a link out of it, through which the command would write somewhere else.

    A folder that this user made at this place may have such links, for example to checkpoints on another disk. The
    folder itself may be a link.

    Args:
        folder: folder of a run, sweep or study; it may be missing.
        instead: what to do if the link is right, for the message.

    Raises:
        UserError: naming the first such link.
    """
    if not folder.is_dir() or is_known(folder_fact(folder)):
        return
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not stays_inside(folder, path.name):
            raise UserError(
                f"{path}: is a link to {os.readlink(path)}, out of a folder that was not made by you on this machine; "
                f"remove it, or if it is right, {instead}"
            )


def _deciding(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys that decide which code runs, or where files and data go, beyond a run's own folder."""
    for key, value in _walk(config):
        text = value if isinstance(value, str) else ""
        if (key in _PLACES and value is not None) or "${" in text or (key in _CLASS_KEYS and _is_file(text)):
            yield key, value
        elif key.startswith("trainer.") and ("." in text or _is_file(text)):
            if not (key.endswith("class_path") and value.startswith(_CLASSES)):  # other code, a function or a path
                yield key, value
        elif key == "model.pretrained.path" and text and not Path(text).is_dir():  # it would be fetched
            yield key, value
        elif key.partition(".")[0] == "include":
            yield "include", value


def _is_file(text: str) -> bool:
    """Return whether a text may be a file: jsonargparse reads an object from a file where a class is expected."""
    return "/" in text or "\0" in text or Path(text).is_file()


def _walk(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all (dotted key, value) that are no mappings or lists, those in lists too."""
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        if isinstance(value, Mapping | list):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def config_fact(text: str) -> str:
    """Return the line about a configuration: its digest."""
    return f"config {hashlib.sha256(text.encode()).hexdigest()}"


def folder_fact(folder: Path) -> str:
    """Return the line about a folder that this user made."""
    return f"folder {str(folder.resolve())!r}"


def is_known(fact: str) -> bool:
    """Return whether this user has written it on this machine."""
    return fact in _known()


def remember(fact: str) -> None:
    """Keep a line about what this user has written. Without a home, or without room, it is asked for again later."""
    file = known_file()
    if file is None or fact in _known():
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, f"{fact}\n".encode(errors="replace"))
        finally:
            os.close(descriptor)
    except OSError as error:
        print(f"warning: {file} cannot be written: {error.strerror}", file=sys.stderr)


def known_file() -> Path | None:
    """Return the file of what this user has written on this machine; `None` for a user without a home."""
    try:
        folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    except RuntimeError:
        return None
    return folder / "lightning_moe" / "known" if folder.is_absolute() else None


def _known() -> set[str]:
    file = known_file()
    try:
        return set() if file is None else set(file.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError):
        return set()
