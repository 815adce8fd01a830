"""Which process works on which trial: locks that the operating system or PostgreSQL frees when their holder dies.

A trial that is RUNNING in the study while nobody holds its lock was abandoned: whoever takes the lock goes on with it.
No heartbeat, no time-out: a killed process's trial is free at once, and a stalled process's never.
"""

from __future__ import annotations

import fcntl
import os
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_moe.errors import UserError

TURN = 0  # held while a process looks for work, so that two never choose at the same time
SCRIBE = 1  # held by the process that keeps the sweep's own record
FIRST_TRIAL = 2
#: after an outage of a server, the time in which every process that still lives takes its locks again
SETTLE_SECONDS = 15.0

#: of every connection to PostgreSQL: a server that vanished without a word is noticed in 40 seconds (libpq: 2 hours)
CONNECTION: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 10,
    "keepalives_count": 3,
}


class Claims(ABC):
    """Locks with numbers, shared by all processes of a study."""

    patience = 0.0  # seconds for which an outage of the study's storage is waited out

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

    def check(self) -> None:  # noqa: B027 - nothing to do where locks cannot be lost
        """Raise ConnectionError where the locks of this process are gone."""

    def renew(self, numbers: Collection[int]) -> set[int]:
        """After an error of the storage: have these locks and no others; returns those that somebody else took.

        Raises:
            ConnectionError: it still does not answer.
        """
        return set()

    def settled(self) -> bool:
        """Whether what is not locked was abandoned; false soon after an outage, when others are still coming back."""
        return True

    def start_delay(self) -> float:
        """Seconds that a process which was not there before should wait, because the server has only just started."""
        return 0.0

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
        ConnectionError: from any method, when it does not answer any more; then all locks are gone, until `renew`.
    """

    patience = 1800.0

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._study = zlib.crc32(name.encode()) - 2**31  # PostgreSQL's keys are two signed 32-bit numbers
        self._held: set[int] = set()
        self._settled_from = 0.0
        try:
            self._connect()
        except ConnectionError as error:
            raise UserError(f"cannot be reached: {' '.join(str(error).split())}") from error

    def _connect(self) -> None:
        import psycopg

        try:
            self._connection: Any = psycopg.connect(self._url, autocommit=True, **CONNECTION)
            for name in ("idle", "interval", "count"):  # the server's side, too
                self._connection.execute(f"SET tcp_keepalives_{name} = {CONNECTION[f'keepalives_{name}']}")
        except psycopg.Error as error:
            raise ConnectionError(str(error)) from error

    def try_lock(self, number: int) -> bool:
        taken = bool(self._call("pg_try_advisory_lock", number))
        if taken:
            self._held.add(number)
        return taken

    def lock(self, number: int) -> None:
        self._call("pg_advisory_lock", number)
        self._held.add(number)

    def unlock(self, number: int) -> None:
        self._call("pg_advisory_unlock", number)
        self._held.discard(number)

    def close(self) -> None:
        self._connection.close()

    def check(self) -> None:
        self._execute("SELECT 1")

    def renew(self, numbers: Collection[int]) -> set[int]:
        try:
            for number in self._held.difference(numbers):
                self.unlock(number)
            self.check()
        except ConnectionError:
            self._connection.close()
            self._connect()
            self._held.clear()
            self._settled_from = time.monotonic() + SETTLE_SECONDS
        return {number for number in numbers if number not in self._held and not self.try_lock(number)}

    def settled(self) -> bool:
        return time.monotonic() > self._settled_from

    def start_delay(self) -> float:
        uptime = self._execute("SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())")
        return max(0.0, SETTLE_SECONDS - float(uptime))

    def _call(self, function: str, number: int) -> Any:
        return self._execute(f"SELECT {function}(%s, %s)", (self._study, number))

    def _execute(self, query: str, values: tuple[int, ...] = ()) -> Any:
        import psycopg

        try:
            return self._connection.execute(query, values).fetchone()[0]
        except psycopg.OperationalError as error:
            raise ConnectionError(str(error)) from error
