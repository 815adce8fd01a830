"""The uploading process: ``python -m lightning_moe.tracking.worker``, started by `session` beside a training process.

It is a process and not a thread, because MLflow's own work (import, database, JSON) holds the interpreter lock
(decision 33). Beside a loop of short steps, a thread stalled single steps by up to 260 ms and halved their rate in the
first seconds. The process also outlives a killed training process for the moment that it takes to send the last metrics
and the status ``KILLED``.

It reads settings (one line of JSON) from standard input, then one line per request to send at once. The end of standard
input means that training is over. It answers in lines of JSON:
``{"event": "synced" | "failing" | "recovered" | "note", …}``.
"""

import json
import os
import select
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_moe.redaction import RedactedStream

# Defaults, if the user's environment does not set them. Each call is tried once, because this process tries again
# itself and MLflow's default is to hang for minutes. MLflow's makers get no reports.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
LONGEST_PAUSE = 60.0
AWAITED_PAUSE = 2.0
NICENESS = 5


def main() -> None:
    """Send until standard input ends and everything is sent, or until the time for it is over."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log
    for name in ("stdout", "stderr"):
        setattr(sys, name, RedactedStream(getattr(sys, name)))
    set_environment()
    os.nice(NICENESS)
    requests = _Requests()
    settings = json.loads(requests.wait_for_line())

    def answer(event: str, **content: Any) -> None:
        with suppress(BrokenPipeError):  # the training process has ended
            answers.write(json.dumps({"event": event, **content}) + "\n")

    _serve(settings, requests, answer)
    os._exit(0)  # MLflow leaves threads that could keep the process alive


def set_environment() -> None:
    """Set MLflow's environment for a process of ours that talks to it. Call it before MLflow is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _serve(settings: dict[str, Any], requests: "_Requests", answer: Any) -> None:
    from lightning_moe.tracking.recovery import close_abandoned_run
    from lightning_moe.tracking.uploader import RunUploader, describe

    run_dir = Path(settings["run_dir"])
    uploader = RunUploader(
        run_dir,
        settings["tracking_uri"],
        settings["experiment_name"],
        report=lambda text: answer("note", text=text),
    )
    answered = failures = 0
    deadline = float("inf")
    while True:
        if requests.ended and deadline == float("inf"):
            deadline = time.monotonic() + settings["finalize_seconds"]
        wanted = requests.count
        try:
            run_is_over = requests.ended and close_abandoned_run(run_dir)
            uploader.sync()
        except Exception as error:
            traceback.print_exc()
            failures += 1
            if failures == 2:  # a single failure may be a database that was busy for a moment
                answer("failing", error=describe(error))
            # The training process waits, but not for long: a store that comes back now must not be missed.
            awaited = requests.ended or wanted > answered
            pause = min(2.0**failures / 2, AWAITED_PAUSE if awaited else LONGEST_PAUSE)
        else:
            if failures >= 2:
                answer("recovered")
            failures = 0
            if wanted > answered:
                answer("synced", request=wanted)
                answered = wanted
            pause = settings["flush_seconds"]
            if run_is_over:
                return
        if time.monotonic() > deadline:
            return
        requests.wait(min(pause, max(0.0, deadline - time.monotonic())))


class _Requests:
    """A counter of the lines of standard input."""

    def __init__(self) -> None:
        self.count = -1  # the first line holds the settings
        self.ended = False
        self._buffer = b""

    def wait_for_line(self) -> bytes:
        while not self.ended and b"\n" not in self._buffer:
            self._read()
        return self._buffer.partition(b"\n")[0]

    def wait(self, seconds: float) -> None:
        """Wait until a request or the end comes, at most ``seconds``."""
        if self.ended:
            time.sleep(seconds)
        elif select.select([0], [], [], seconds)[0]:
            self._read()

    def _read(self) -> None:
        content = os.read(0, 65536)
        self.ended = not content
        self.count += content.count(b"\n")
        if b"\n" not in self._buffer:
            self._buffer += content


if __name__ == "__main__":
    main()
