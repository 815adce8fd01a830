"""A real `mlflow server` that is started, killed and started again."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from lightning_moe.tracking.store import serve_command

PATIENCE = 180.0


class Server:
    """`mlflow server` on a database, in a folder of its own."""

    def __init__(self, uri: str, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.command = serve_command(uri, self.port)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self.command
        self.folder.mkdir(exist_ok=True)
        with (self.folder.parent / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command, shell=True, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).read()
                return
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.2)

    def kill(self) -> None:
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
