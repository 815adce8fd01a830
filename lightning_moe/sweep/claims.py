"""Which process works on which trial: locks that the operating system or PostgreSQL frees when their holder dies.

A trial that is RUNNING in the study while nobody holds its lock was abandoned: whoever takes the lock goes on with it.
No heartbeat, no time-out: a killed process's trial is free at once, and a stalled process's never.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_moe.errors import UserError

TURN = 0  # held while a process looks for work, so that two never choose at the same time
SCRIBE = 1  # held by the process that keeps the sweep's own record
FIRST_TRIAL = 2


class Claims(ABC):
    """Locks with numbers, shared by all processes of a study."""

    @abstractmethod
    def try_lock(self, number: int) -> bool:
        """Take a lock that nobody else has; false where someone else does."""

    @abstractmethod
    def lock(self, number: int) -> None:
        """Take a lock as soon as nobody else has it."""

    @abstractmethod
    def unlock(self, number: int) -> None:
        """Let go of a lock that this process has."""

    @abstractmethod
    def close(self) -> None:
        """Let go of all."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One process of the study at a time."""
        self.lock(TURN)
        try:
            yield
        finally:
            self.unlock(TURN)


class FileClaims(Claims):
    """Locks on single bytes of a file, for processes of one machine.

    Args:
        path: the file; made where it is missing, always empty. No other code of this process may open it: POSIX frees
            all of a process's locks on a file when it closes any descriptor of that file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def try_lock(self, number: int) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def lock(self, number: int) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, number)

    def unlock(self, number: int) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, number)

    def close(self) -> None:
        os.close(self._fd)


class PostgresClaims(Claims):
    """Advisory locks of a PostgreSQL session, for processes of any machine.

    The server frees them when the connection ends; it looks after a silent one every ten seconds.

    Args:
        url: ``postgresql://…``, as psycopg takes it.
        name: the study's.

    Raises:
        UserError: the server cannot be reached.
        ConnectionError: from any method, when it does not answer any more; then all locks are gone.
    """

    def __init__(self, url: str, name: str) -> None:
        import psycopg

        try:
            self._connection: Any = psycopg.connect(url, autocommit=True, connect_timeout=10)
        except psycopg.Error as error:
            raise UserError(f"cannot be reached: {' '.join(str(error).split())}") from error
        for setting in ("tcp_keepalives_idle = 10", "tcp_keepalives_interval = 10", "tcp_keepalives_count = 3"):
            self._connection.execute(f"SET {setting}")
        self._study = zlib.crc32(name.encode()) - 2**31  # PostgreSQL's keys are two signed 32-bit numbers

    def try_lock(self, number: int) -> bool:
        return bool(self._call("pg_try_advisory_lock", number))

    def lock(self, number: int) -> None:
        self._call("pg_advisory_lock", number)

    def unlock(self, number: int) -> None:
        self._call("pg_advisory_unlock", number)

    def close(self) -> None:
        self._connection.close()

    def _call(self, function: str, number: int) -> Any:
        import psycopg

        try:
            return self._connection.execute(f"SELECT {function}(%s, %s)", (self._study, number)).fetchone()[0]
        except psycopg.OperationalError as error:
            raise ConnectionError(str(error)) from error
