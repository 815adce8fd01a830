"""The uploading process, seen from the training process. No call waits for the store unless its docstring says so."""

import json
import logging
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning_moe
from lightning_moe.redaction import redact

LOG_FILE = "mlflow.log"
UPLOAD_COMMAND = "python -m lightning_moe.tracking"

log = logging.getLogger(__name__)


def upload_hint(run_dir: Path) -> str:
    """Return a sentence that says where everything is kept, and how to send it later."""
    return f"Everything is kept in {run_dir}. `{UPLOAD_COMMAND} {run_dir}` sends what MLflow lacks."


class UploadProcess:
    """One running `worker`.

    Args:
        run_dir: directory of the run.
        tracking_uri: MLflow's store; it travels through a pipe, because it may hold a password.
        experiment_name: experiment of the run.
        flush_seconds: pause between two uploads.
        finalize_seconds: time for which the process keeps trying after training.
    """

    def __init__(
        self,
        run_dir: Path,
        tracking_uri: str,
        experiment_name: str,
        flush_seconds: float,
        finalize_seconds: float,
    ) -> None:
        self._run_dir = run_dir
        self._tracking_uri = tracking_uri
        self._owner = os.getpid()
        self._requested = 0
        self._answered = 0
        self._buffer = b""
        self._gone = False
        root = str(Path(lightning_moe.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with (run_dir / LOG_FILE).open("ab") as library_output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lightning_moe.tracking.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=library_output,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the training process; this one still has the end to send
            )
        assert self._process.stdin
        assert self._process.stdout
        self._input, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._output, False)
        settings = {
            "run_dir": str(run_dir),
            "tracking_uri": tracking_uri,
            "experiment_name": experiment_name,
            "flush_seconds": flush_seconds,
            "finalize_seconds": finalize_seconds,
        }
        os.write(self._input, json.dumps(settings).encode() + b"\n")

    def poll(self) -> None:
        """Pass on to the user what the process reports. It costs a microsecond if there is nothing."""
        if self._gone:
            return
        try:
            content = os.read(self._output, 1 << 16)
        except BlockingIOError:
            return
        if not content:
            self._gone = True
            log.warning(
                "The process that sends run %s to MLflow ended (exit code %s; see %s). %s",
                self._run_dir.name,
                self._process.wait(),
                self._run_dir / LOG_FILE,
                upload_hint(self._run_dir),
            )
            return
        *lines, self._buffer = (self._buffer + content).split(b"\n")
        for line in lines:
            self._hear(json.loads(line))

    def _hear(self, answer: dict[str, Any]) -> None:
        match answer["event"]:
            case "synced":
                self._answered = answer["request"]
            case "failing":
                log.warning(
                    "MLflow at %s does not take the metrics: %s\nTraining goes on, and MLflow is tried again. %s",
                    redact(self._tracking_uri),
                    answer["error"],
                    upload_hint(self._run_dir),
                )
            case "recovered":
                log.warning("MLflow at %s answers again and has everything.", redact(self._tracking_uri))
            case "note":
                log.warning(answer["text"])

    def wait_until_sent(self, seconds: float) -> bool:
        """Ask for everything to be sent now; return whether the store has it within ``seconds``."""
        self._requested += 1
        deadline = time.monotonic() + seconds
        with suppress(BrokenPipeError):  # the process has ended: poll will say so
            os.write(self._input, b"\n")
        answers = select.poll()  # select() would refuse file descriptors above 1023
        answers.register(self._output, select.POLLIN)
        while self._answered < self._requested and not self._gone and time.monotonic() < deadline:
            answers.poll(max(0.0, deadline - time.monotonic()) * 1000)
            self.poll()
        return self._answered >= self._requested

    def stop(self) -> None:
        """Stop the process at once. What it has not sent stays in the record."""
        if os.getpid() != self._owner:
            return  # a forked copy, such as a data loader's worker, does not own it
        self._gone = True
        self._process.kill()
        self._process.communicate()  # waits, and closes the pipes
