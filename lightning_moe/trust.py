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

    Args:
        text: content of the run's ``config.yaml``, see `config_fact`.
        config: the same, parsed.
        run_dir: folder of the run.

    Raises:
        UserError: naming the first such key, or the first link that leads out of the folder.
    """
    if is_known(config_fact(text)):
        return
    file = run_dir / CONFIG_FILE
    for key, value in _deciding(config):
        raise UserError(
            f"{file}: {key}={value!r}: this file was not written by you on this machine, so it does not decide which "
            f"code runs and where files and data go. If it is right, name it: --config {file}"
        )
    for path in sorted(run_dir.iterdir()):
        if path.is_symlink() and not stays_inside(run_dir, path.name):
            raise UserError(
                f"{path}: is a link to {os.readlink(path)}, out of a run's folder that was not made by you on this "
                f"machine; remove it, or if it is right, name the configuration: --config {file}"
            )


def _deciding(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys that decide which code runs, or where files and data go, beyond a run's own folder."""
    for key, value in _walk(config):
        if (key in _PLACES and value is not None) or (isinstance(value, str) and "${" in value):
            yield key, value
        elif key.startswith("trainer.") and isinstance(value, str) and ("." in value or "/" in value):
            if not (key.endswith("class_path") and value.startswith(_CLASSES)):  # other code, a function or a path
                yield key, value
        elif key.partition(".")[0] == "include":
            yield "include", value


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
