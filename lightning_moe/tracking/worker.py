"""The uploading process: ``python -m lightning_moe.tracking.worker``, started by `session` beside a training process.

A process and not a thread, because MLflow's own work (import, database, JSON) holds the interpreter lock: beside a loop
of short steps a thread doing it stalled single steps by up to 260 ms and halved their rate in the first seconds.
It also outlives a killed training process, for the moment it takes to send the last metrics and the status ``KILLED``.

It reads settings (one line of JSON), then one line per request to send at once, from standard input, whose end means
that training is over. It answers in lines of JSON: ``{"event": "synced" | "failing" | "recovered" | "note", …}``.
"""

import json
import os
import select
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

# Where the user's environment does not say otherwise. One try per call, since trying again is this process's own affair
# and MLflow's default is to hang for minutes; and no reports to MLflow's makers.
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
    """Upload until standard input ends and all is sent, or until it is too late."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log
    set_environment()
    os.nice(NICENESS)
    requests = _Requests()
    settings = json.loads(requests.wait_for_line())

    def answer(event: str, **content: Any) -> None:
        with suppress(BrokenPipeError):  # nobody is left to listen
            answers.write(json.dumps({"event": event, **content}) + "\n")

    _serve(settings, requests, answer)
    os._exit(0)  # MLflow leaves threads behind that could hold the process


def set_environment() -> None:
    """MLflow's settings for a process of ours that talks to it; to be called before MLflow is imported."""
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
            if failures == 2:  # one failure alone may be a database that was busy for a moment
                answer("failing", error=describe(error))
            # somebody waits for the answer, and not for long: a store that comes back now must not be missed
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
    """Lines of standard input, counted."""

    def __init__(self) -> None:
        self.count = -1  # the first line holds the settings
        self.ended = False
        self._buffer = b""

    def wait_for_line(self) -> bytes:
        while not self.ended and b"\n" not in self._buffer:
            self._read()
        return self._buffer.partition(b"\n")[0]

    def wait(self, seconds: float) -> None:
        """Until a request comes, or the end, at most ``seconds``."""
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
