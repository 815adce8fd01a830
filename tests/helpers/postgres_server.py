"""A PostgreSQL of Debian's packages (``apt-get install postgresql``) in a folder and on a port of its own."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType


class PostgresServer:
    """Runs while the ``with`` block does; `url` names its database, password included.

    Args:
        owner: the role that may do everything.
        secret: its password.
    """

    def __init__(self, owner: str = "sweeper", secret: str = "secret") -> None:
        self._owner, self._secret = owner, secret
        folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        assert folders, "needs PostgreSQL: apt-get install postgresql"
        self._bin = folders[-1]
        self._folder = Path(tempfile.mkdtemp(prefix="lightning_moe-postgres-"))
        self._user = None if os.geteuid() else "postgres"  # it refuses to run as root
        if self._user:
            shutil.chown(self._folder, self._user)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"postgresql://{owner}:{secret}@127.0.0.1:{self.port}/postgres"

    def __enter__(self) -> "PostgresServer":
        password = self._folder / "password"
        password.write_text(f"{self._secret}\n")
        if self._user:
            shutil.chown(password, self._user)
        data = self._folder / "data"
        options = ["-U", self._owner, f"--pwfile={password}", "-A", "scram-sha-256", "--no-sync", "-D", str(data)]
        subprocess.run(
            [self._bin / "initdb", *options], user=self._user, cwd=self._folder, check=True, capture_output=True
        )
        self.start()
        return self

    def start(self) -> None:
        options = ["-p", str(self.port), "-h", "127.0.0.1", "-k", str(self._folder), "-F"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", str(self._folder / "data"), *options],
                user=self._user,
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 60
        while subprocess.run([self._bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]).returncode:
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGQUIT)  # at once, without waiting for clients
        self._process.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self._folder)
