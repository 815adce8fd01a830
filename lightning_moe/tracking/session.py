"""One run while it is recorded: its two files and, if MLflow is used, the process that reads them."""

import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_moe.atomic import write_atomically
from lightning_moe.errors import UserError
from lightning_moe.filenames import JOURNAL_FILE, METRICS_FILE
from lightning_moe.redaction import redact
from lightning_moe.tracking.files import LineFile, inside_run, read_metric_lines
from lightning_moe.tracking.process import UploadProcess, upload_hint
from lightning_moe.tracking.provenance import provenance
from lightning_moe.tracking.store import address_fact
from lightning_moe.trust import remember

LOCK_SECONDS = 10.0  # data loader workers of a killed process hold its lock for a few seconds, until they notice

log = logging.getLogger(__name__)


class RunSession:
    """The writer of one run's record. It opens the record at the first write, and again for a write after the end.

    ``started`` is whether it has written anything.

    Args:
        run_dir: directory of the run; it is made if it is missing.
        tracking_uri: MLflow's store.
        experiment_name: experiment of the run.
        flush_seconds: pause between two uploads; `None` keeps the record on disk only.
        finalize_seconds: longest wait for the store after training.
        tags: tags of the run, in addition to those of `provenance`.
        layer_curves: whether the store gets the values of single layers too (`files.is_of_layer`).
    """

    def __init__(
        self,
        run_dir: Path,
        tracking_uri: str,
        experiment_name: str,
        flush_seconds: float | None,
        finalize_seconds: float,
        tags: Mapping[str, str],
        layer_curves: bool = False,
    ) -> None:
        self.run_dir = run_dir
        self.tracking_uri = tracking_uri
        self.experiment_name = experiment_name
        self._flush_seconds = flush_seconds
        self._finalize_seconds = finalize_seconds
        self._tags = {name: redact(value) for name, value in tags.items()}
        self._layer_curves = layer_curves
        self._owner = os.getpid()
        self._files: tuple[LineFile, LineFile] | None = None
        self._process: UploadProcess | None = None
        self.started = False
        self._ended = False
        self._unsent = False
        self._disk_failed = False

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line of metrics: one write to a local file, whatever the store does."""
        self._append(METRICS_FILE, {"step": step}, metrics)
        if self._process:
            self._process.poll()

    def log_event(self, event: str, **content: Any) -> None:
        """Append one other event."""
        self._append(JOURNAL_FILE, {"event": event}, content)

    def log_artifact(self, path: Path, folder: str | None) -> None:
        """Append a file for the store, see `inside_run`.

        Args:
            path: path of the file; it must exist until it is sent.
            folder: folder among the run's artifacts; `None` means the top.
        """
        try:
            self.log_event("artifact", path=inside_run(self.run_dir, path, folder), folder=folder)
        except OSError as error:
            self._warn_of_disk(error)

    def save(self, path: Path, content: bytes) -> bool:
        """Write a file of the run. If that fails, warn as for a record that cannot be written, and return false."""
        try:
            write_atomically(path, content)
        except OSError as error:
            self._warn_of_disk(error)
            return False
        return True

    def flush(self) -> None:
        """Wait until what was recorded would survive a power cut."""
        with suppress(OSError):  # a full disk was reported when it happened
            for file in self._files or ():
                file.sync()

    def rewind(self, step: int) -> bool:
        """Remove the first line of metrics with a step ≥ ``step`` and all lines after it. Training continues there.

        Returns:
            Whether there was a record to continue.
        """
        metrics, _ = self._open()
        if metrics.size() == 0:
            return False
        size = 0
        for record, end in read_metric_lines(metrics.path):
            if record["step"] >= step:
                break
            size = end
        metrics.cut(size)
        # This comes after the cut, and even if nothing was cut: an earlier attempt may have died between the two.
        self.log_event("cut", size=size)
        return True

    def end(self, status: str) -> None:
        """Record the end and wait for the store, ``finalize_seconds`` at most.

        Args:
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
        """
        if not self.started:
            return
        self.log_event("end", status=status)
        self._ended = True
        self._wait()
        self._close_files()

    def close(self) -> None:
        """Send what came after the end, and close everything. A run that never ended has failed."""
        if os.getpid() != self._owner:
            return  # a forked copy, such as a data loader's worker, has nothing to send
        if self.started and not self._ended:
            self.end("FAILED")
        self._wait()
        self._close_files()
        if self._process:
            self._process.stop()
            self._process = None

    def _open(self) -> tuple[LineFile, LineFile]:
        if self._files:
            return self._files
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            metrics, journal = LineFile(self.run_dir / METRICS_FILE), LineFile(self.run_dir / JOURNAL_FILE)
        except OSError as error:
            raise UserError(f"the run's directory {self.run_dir} cannot be written: {error}") from error
        deadline = time.monotonic() + LOCK_SECONDS
        while not metrics.try_lock():
            if time.monotonic() > deadline:
                raise UserError(f"{self.run_dir} is in use by another process: choose another run_name")
            time.sleep(0.1)
        for file in (metrics, journal):  # after the lock: another process may be in the middle of a line
            file.drop_partial_line()
        self._files = metrics, journal
        if not self.started:
            self.started = True
            remember(address_fact(self.tracking_uri))
            self.log_event(
                "start",
                tracking_uri=redact(self.tracking_uri),
                experiment_name=self.experiment_name,
                layer_curves=self._layer_curves,
            )
            self.log_event("tags", tags={**provenance(), "run_dir": str(self.run_dir), **self._tags})
        if self._flush_seconds is not None and self._process is None:
            self._process = UploadProcess(
                self.run_dir,
                self.tracking_uri,
                self.experiment_name,
                self._flush_seconds,
                self._finalize_seconds,
            )
        return self._files

    def _append(self, name: str, head: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        metrics, journal = self._open()
        try:
            (metrics if name == METRICS_FILE else journal).append({**head, "time": time.time(), **content})
        except OSError as error:
            self._warn_of_disk(error)
        self._unsent = True

    def _warn_of_disk(self, error: OSError) -> None:
        if not self._disk_failed:
            log.warning("%s cannot be written (%s): training goes on without a record.", self.run_dir, error)
        self._disk_failed = True

    def _wait(self) -> None:
        if not (self._process and self._unsent):
            return
        self._unsent = False
        try:
            sent = self._process.wait_until_sent(self._finalize_seconds)
        except KeyboardInterrupt:  # the user does not want to wait; the recorded end stays
            sent = False
        if not sent:
            log.warning(
                "MLflow at %s did not take the whole run in time (%g s at most). %s",
                redact(self.tracking_uri),
                self._finalize_seconds,
                upload_hint(self.run_dir),
            )

    def _close_files(self) -> None:
        for file in self._files or ():
            file.close()
        self._files = None
