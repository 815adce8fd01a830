"""Paths as people type them."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_moe.bounds import check_text, shown
from lightning_moe.errors import UserError

LONGEST_PART = 255  # bytes of a name, on every file system in use


def user_url(url: str, key: str) -> str:
    """Return the URL of a file (``sqlite:///~/mlflow.db``) with ``~`` as in `user_path`; another one stays as it is.

    Raises:
        UserError: there is no such home folder.
    """
    scheme, slashes, path = url.partition(":///")
    return f"{scheme}{slashes}{user_path(path, key)}" if slashes and path.startswith("~") else url


def user_path(text: str | Path, key: str) -> Path:
    """Return a path in which ``~`` and ``~name`` are home folders.

    The shell does not expand ``~`` after ``=``, nor in a file.

    Args:
        text: path as typed.
        key: key or flag that has it, for the message.

    Raises:
        UserError: it is no text, no file can have that name, or there is no such home folder.
    """
    if not isinstance(text, str | Path):
        raise UserError(f"{key}={shown(text)}: must be a path")
    check_text(str(text), key)
    if any(len(os.fsencode(part)) > LONGEST_PART for part in str(text).split("/")):
        raise UserError(f"{key}={shown(str(text))}: a file's name has {LONGEST_PART} bytes at most")
    if not str(text).startswith("~"):
        return Path(text)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"{key}={str(text)!r}: there is no such home folder; ./~ would be a folder of that name"
        ) from None
