"""Locks that processes share, and that the operating system or PostgreSQL frees when their holder dies.

A trial that is RUNNING in Optuna while nobody holds its lock was abandoned, and the process that takes the lock
continues it. There is no heartbeat and no time-out: the trial of a killed process is free at once, that of a stalled
process never.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_moe.errors import UserError
from lightning_moe.file_locks import NO_LOCKS

MUTEX = 0  # held while a process chooses a trial, so that two never choose at the same time
LEADER = 1  # held by the process that keeps the sweep's own record; by the only process of a study
FIRST_TRIAL = 2
GRACE_SECONDS = 15.0  # time after an outage of a server in which every living process takes its locks again

#: of every connection to PostgreSQL: a server that vanished silently is noticed in 40 seconds (libpq: 2 hours)
CONNECTION: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 10,
    "keepalives_count": 3,
}
_FLOCK = "hhqqi0q"  # struct flock of <fcntl.h> on 64-bit Linux: type, whence, start, length, pid
_HOLDER = """
    SELECT max(application_name) FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE locktype = 'advisory' AND granted AND classid = %s AND objid = %s
      AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())"""


class Locks(ABC):
    """Numbered locks, shared by all processes that work on the same thing."""

    patience = 0.0  # longest outage of the storage to wait for, in seconds

    @abstractmethod
    def try_lock(self, number: int) -> bool:
        """Take a lock that nobody else has; return false if someone else does."""

    @abstractmethod
    def lock(self, number: int) -> None:
        """Wait until nobody else has a lock, and take it."""

    @abstractmethod
    def unlock(self, number: int) -> None:
        """Free a lock that this process has."""

    @abstractmethod
    def holder(self, number: int) -> str:
        """Name the process that has a lock, such as ``process 4711``, or ``another process`` if it is not known."""

    @abstractmethod
    def close(self) -> None:
        """Free all locks."""

    def check(self) -> None:  # noqa: B027 - nothing to do if locks cannot be lost
        """Raise ConnectionError if the locks of this process are gone."""

    def renew(self, numbers: Collection[int]) -> set[int]:
        """Take these locks again after an error of the storage, and free all others.

        Returns:
            The locks that somebody else has taken.

        Raises:
            ConnectionError: the storage still does not answer.
        """
        return set()

    def in_grace_period(self) -> bool:
        """Return whether an outage has just ended, so that a free lock does not mean yet that its holder is dead."""
        return False

    def grace_after_server_start(self) -> float:
        """Return the seconds that a new process must wait because the server itself has just started."""
        return 0.0

    @contextmanager
    def mutex(self) -> Iterator[None]:
        """Let only one process at a time into the block."""
        self.lock(MUTEX)
        try:
            yield
        finally:
            self.unlock(MUTEX)


class FileLocks(Locks):
    """Locks on single bytes of a file, for processes of one machine.

    Args:
        path: path of the empty file, which is made if it is missing. No other code of this process may open it: POSIX
            frees all of a process's locks on a file when it closes any descriptor of that file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def try_lock(self, number: int) -> bool:
        try:
            self._lock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def lock(self, number: int) -> None:
        self._lock(number, fcntl.LOCK_EX)

    def _lock(self, number: int, kind: int) -> None:
        try:
            fcntl.lockf(self._fd, kind, 1, number)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise UserError(
                f"{self._path}: its file system has no locks, so two processes could train the same; give an "
                "output_dir on another one (or, for a sweep, storage: postgresql://…)"
            ) from None

    def unlock(self, number: int) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, number)

    def holder(self, number: int) -> str:
        pid = 0
        if sys.platform == "linux":
            wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
            kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(self._fd, fcntl.F_GETLK, wanted))
            pid = 0 if kind == fcntl.F_UNLCK else pid
        return f"process {pid}" if pid > 0 else "another process"  # 0: it lives in another container

    def close(self) -> None:
        os.close(self._fd)


class PostgresLocks(Locks):
    """Advisory locks of a PostgreSQL session, for processes of any machine.

    The server frees them when the connection ends; it probes a silent one every ten seconds.

    Args:
        url: address ``postgresql://…`` for psycopg.
        name: name of the sweep, whose processes share the locks.

    Raises:
        UserError: the server cannot be reached.
        ConnectionError: the server no longer answers (any method raises it); then all locks are gone until `renew`.
    """

    patience = 1800.0

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._key = zlib.crc32(name.encode()) - 2**31  # PostgreSQL's keys are two signed 32-bit numbers
        self._held: set[int] = set()
        self._grace_until = 0.0
        try:
            self._connect()
        except ConnectionError as error:
            raise UserError(f"cannot be reached: {' '.join(str(error).split())}") from error

    def _connect(self) -> None:
        import psycopg

        holder = f"process {os.getpid()} on {socket.gethostname()}"[:63]  # what `holder` returns
        try:
            self._connection: Any = psycopg.connect(self._url, autocommit=True, application_name=holder, **CONNECTION)
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

    def holder(self, number: int) -> str:
        unsigned = self._key % 2**32  # as pg_locks shows it
        return str(self._execute(_HOLDER, (unsigned, number)) or "another process")

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
            self._grace_until = time.monotonic() + GRACE_SECONDS
        return {number for number in numbers if number not in self._held and not self.try_lock(number)}

    def in_grace_period(self) -> bool:
        return time.monotonic() <= self._grace_until

    def grace_after_server_start(self) -> float:
        uptime = self._execute("SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())")
        return max(0.0, GRACE_SECONDS - float(uptime))

    def _call(self, function: str, number: int) -> Any:
        return self._execute(f"SELECT {function}(%s, %s)", (self._key, number))

    def _execute(self, query: str, values: tuple[int, ...] = ()) -> Any:
        import psycopg

        try:
            return self._connection.execute(query, values).fetchone()[0]
        except psycopg.OperationalError as error:
            raise ConnectionError(str(error)) from error
