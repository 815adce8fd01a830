"""Paths as people type them."""

from __future__ import annotations

from pathlib import Path

from lightning_moe.errors import UserError


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
        UserError: there is no such home folder.
    """
    if not str(text).startswith("~"):
        return Path(text)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"{key}={str(text)!r}: there is no such home folder; ./~ would be a folder of that name"
        ) from None
