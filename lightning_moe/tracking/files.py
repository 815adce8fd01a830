"""The record of a run on disk, the one source of everything that MLflow is told.

`metrics.jsonl`    one line per `log_metrics` call: {"step": 40, "time": 1763800000.1, "train/loss": 3.2, …}
`tracking.jsonl`   one line per other event, in order: start, tags, params, artifact, cut of the metrics, status
`mlflow_run.json`  which MLflow run this is, and how many bytes of the two files it already holds

Both `.jsonl` files only grow by whole lines, so another process may read them while they are written. JSON has no
NaN and no infinities: they are written as the strings "NaN", "Infinity" and "-Infinity".
"""

import fcntl
import json
import math
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_moe.filenames import METRICS_FILE

RESERVED_METRIC_NAMES = frozenset({"step", "time"})
_NAME_CHARACTERS = re.compile(r"[\w.\- :/]+")
_LONGEST_NAME = 250
_LONGEST_LINE = 1 << 22
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def is_of_layer(name: str) -> bool:
    """Whether a metric is one value of one layer, ``<group>/layer_03/<name>``; not so those of its experts."""
    return re.fullmatch(r"[^/]+/layer_\d+\w*/[^/]+", name) is not None


def is_valid_name(name: str) -> bool:
    """Whether MLflow takes `name` for a metric, parameter or tag.

    It takes letters, digits and ``_ - . : space``, in parts joined by ``/`` as in a plain relative path, 250 characters
    at most.
    """
    simple = _NAME_CHARACTERS.fullmatch(name) is not None and posixpath.normpath(name) == name != "."
    return simple and not name.startswith(("/", "..")) and len(name) <= _LONGEST_NAME


def encode(record: Mapping[str, Any]) -> bytes:
    """One line of JSON, newline included."""
    try:
        text = json.dumps(record, allow_nan=False)
    except ValueError:
        text = json.dumps({key: _spell(value) for key, value in record.items()}, allow_nan=False)
    return text.encode() + b"\n"


def _spell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def decode_metric(value: float | str) -> float:
    """The number behind a value of `metrics.jsonl`."""
    return _NON_FINITE[value] if isinstance(value, str) else float(value)


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Records of the whole lines after byte `offset`, each with the offset of its end.

    A last line without a newline is still being written and is left for later. A line that is no JSON object is
    passed over (its neighbours are still good).
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record, offset


def try_lock(fd: int) -> bool:
    """Take the exclusive lock of an open file without waiting; false where another process has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # this file system has no locks
    return True


class LineFile:
    """A file that grows by whole lines, each in one `write`, so that a crash cannot lose a line already written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._drop_partial_line()

    def append(self, record: Mapping[str, Any]) -> None:
        """Raises OSError when the disk is full or gone; whole lines before stay whole."""
        line = encode(record)
        if os.write(self._fd, line) != len(line):
            self._drop_partial_line()
            raise OSError(f"no room left for {self.path}")

    def try_lock(self) -> bool:
        """Take the file for this process, without waiting; false where another process has it."""
        return try_lock(self._fd)

    def cut(self, size: int) -> None:
        """Forget everything after the first `size` bytes, in one system call."""
        os.ftruncate(self._fd, size)

    def sync(self) -> None:
        """Wait until the file would survive a power cut."""
        os.fsync(self._fd)

    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    def _drop_partial_line(self) -> None:
        size = self.size()
        start = max(0, size - _LONGEST_LINE)
        tail = os.pread(self._fd, size - start, start)
        if tail and not tail.endswith(b"\n"):
            self.cut(start + tail.rfind(b"\n") + 1)


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Every line of a run's `metrics.jsonl`: `step` (int), `time` (float, seconds since 1970) and the metrics (float).

    Empty when nothing was logged. NaN and infinities come back as floats.
    """
    return [
        {name: value if name in RESERVED_METRIC_NAMES else decode_metric(value) for name, value in record.items()}
        for record, _ in read_lines(Path(run_dir) / METRICS_FILE)
    ]
