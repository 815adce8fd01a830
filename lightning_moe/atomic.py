"""Files and folders that exist whole or not at all."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)

_SUFFIXES = (".tmp", ".old")
#: temporary names; those of earlier versions have no machine
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)(?:@(?P<host>[^@]+))?\.(?P<suffix>tmp|old)")

log = logging.getLogger(__name__)


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file for writing that takes the place of ``path`` if the block ends without an error.

    The content goes to a temporary file in the same folder, reaches the disk, and is then renamed. A crash or an error
    in the block leaves the old file as it was.

    Raises:
        OSError: the file cannot be written; names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    temporary = _beside(path, "tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            _fsync(file.fileno(), temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)  # the error of a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Make an empty folder that becomes ``path`` if the block ends without an error; otherwise it is removed.

    Args:
        path: folder to make.
        replace: whether an existing folder of that name is removed after the new one is complete.

    Raises:
        OSError: the folder exists, and ``replace`` is false.
    """
    remove_leftovers(path.parent, path.name)
    temporary, old = _beside(path, "tmp"), _beside(path, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        mode = temporary.stat().st_mode  # as the user's umask has it; some libraries write files for their owner only
        for part in (*temporary.rglob("*"), temporary):
            part.chmod(mode & 0o777 if part.is_dir() else mode & 0o666)
            sync(part)
        if replace and path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, suffix: str) -> Path:
    """Return the name of a temporary file or folder of this process."""
    return path.with_name(f".{path.name}.{os.getpid()}@{socket.gethostname()}.{suffix}")


def remove_leftovers(folder: Path, name: str = "", other_machines: bool = False) -> None:
    """Remove the temporary files and folders that a killed process left; those of a living one stay.

    A folder that was set aside, and whose successor did not get its place, gets it back.

    Args:
        folder: folder to look in.
        name: name that the files would have got; empty for any.
        other_machines: whether to remove those of processes on other machines too, whose end cannot be seen from here.
    """
    try:
        names = [entry for entry in os.listdir(folder) if entry.startswith(f".{name}") and entry.endswith(_SUFFIXES)]
    except OSError:  # it does not exist yet, or is for writing only
        return
    for found in filter(None, map(_LEFTOVER.fullmatch, names)):
        elsewhere = found["host"] not in (None, socket.gethostname())
        if (name and found["name"] != name) or (elsewhere and not other_machines):
            continue
        if not elsewhere and _lives(int(found["process"])):
            continue
        path, target = folder / found[0], folder / found["name"]
        with suppress(OSError):  # another process may be faster
            if found["suffix"] == "old" and not os.path.lexists(target):
                os.rename(path, target)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return process > 0


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` so that a crash leaves the old file or the new one, never a mixture."""
    with atomic_open(path) as file:
        file.write(content)


def check_writable(folder: Path) -> None:
    """Check, before long work, that its results can be written. Nothing is left in the folder.

    Args:
        folder: folder of the results. If it is missing, it is made with its parents for the time of the check.

    Raises:
        OSError: no file can be written in it.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    finally:
        for path in missing:
            with suppress(OSError):  # it was not made, or another process uses it by now
                path.rmdir()


def sync(path: Path) -> None:
    """Make a file or a folder (the names in it) survive a power cut, if its file system can do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder may be for writing only
        if not path.is_dir():
            raise
        return
    try:
        _fsync(descriptor, path)
    finally:
        os.close(descriptor)


def _fsync(descriptor: int, path: Path) -> None:
    """Wait for the disk. Some file systems (CIFS, FUSE, vboxsf) cannot, for folders or at all."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
        _warn("folders" if path.is_dir() else "files")


@cache
def _warn(what: str) -> None:
    log.warning("warning: this file system does not sync %s: the last ones may be lost in a power cut", what)
