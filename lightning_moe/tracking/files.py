"""The record of a run on disk, the only source of what MLflow gets.

`metrics.jsonl`    one line per `log_metrics` call: {"step": 40, "time": 1763800000.1, "train/loss": 3.2, …}
`tracking.jsonl`   one line per other event, in order: start, tags, params, artifact, cut of the metrics, status
`mlflow_run.json`  which MLflow run this is, and how many bytes of the two files it already holds

Both `.jsonl` files grow by whole lines only, so another process may read them while they are written. JSON has no NaN
and no infinities: they are written as the strings "NaN", "Infinity" and "-Infinity".
"""

import json
import math
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Interval, Len
from typing_extensions import TypedDict

from lightning_moe.atomic import write_atomically
from lightning_moe.errors import UserError
from lightning_moe.file_locks import take_lock
from lightning_moe.file_schema import check, refuse_special
from lightning_moe.filenames import ARTIFACTS_FOLDER, JOURNAL_FILE, METRICS_FILE

#: tag that MLflow shows as Markdown on the run's page
NOTE_TAG = "mlflow.note.content"
LONGEST_TAG = 8000  # characters of a tag in MLflow; longer ones are cut
RESERVED_METRIC_NAMES = frozenset({"step", "time"})
_NAME_CHARACTERS = re.compile(r"[\w.\- :/]+")
_LONGEST_NAME = 250
_LONGEST_LINE = 1 << 22
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Time = Annotated[float, Interval(ge=0, le=2**40)]  # seconds since 1970


class MetricLine(TypedDict):
    """A line of `metrics.jsonl`, beside the metrics themselves."""

    step: Annotated[int, Interval(gt=-(2**63), lt=2**63)]
    time: Time


_Values = dict[str, float | Literal["NaN", "Infinity", "-Infinity"]]


class _Event(TypedDict):
    event: str
    time: Time


class _Start(_Event):
    tracking_uri: str
    experiment_name: Annotated[str, Len(1)]
    layer_curves: NotRequired[bool]


class _End(_Event):
    status: Literal["FINISHED", "FAILED", "KILLED"]


class _Tags(_Event):
    tags: dict[str, str]


class _Params(_Event):
    params: dict[str, str]


class _Artifact(_Event):
    path: str
    folder: str | None


class _Cut(_Event):
    size: Annotated[int, Interval(ge=0, lt=2**63)]


#: kind of a line of `tracking.jsonl` → its schema; another kind is of a later version, and left alone
_EVENTS = {"start": _Start, "end": _End, "tags": _Tags, "params": _Params, "artifact": _Artifact, "cut": _Cut}


def is_of_layer(name: str) -> bool:
    """Return whether a metric is a value of one layer, ``<group>/layer_03/<name>``, and not of an expert."""
    return re.fullmatch(r"[^/]+/layer_\d+\w*/[^/]+", name) is not None


def is_valid_name(name: str) -> bool:
    """Return whether MLflow takes ``name`` for a metric, parameter or tag.

    It takes letters, digits and ``_ - . : space``, in parts joined by ``/`` as in a plain relative path, and at most
    250 characters.
    """
    simple = _NAME_CHARACTERS.fullmatch(name) is not None and posixpath.normpath(name) == name != "."
    return simple and not name.startswith(("/", "..")) and len(name) <= _LONGEST_NAME


def encode(record: Mapping[str, Any]) -> bytes:
    """Encode a record as one line of JSON, newline included."""
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
    """Return the number that a value of `metrics.jsonl` stands for."""
    return _NON_FINITE[value] if isinstance(value, str) else float(value)


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the records of the whole lines after byte ``offset``, each with the offset of its end.

    A last line without a newline is still being written, and is left for later. A line that is no JSON object is
    skipped (its neighbours are still good).

    Raises:
        UserError: the path is no regular file, or cannot be read.
    """
    if not path.exists():
        return
    refuse_special(path)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while (line := file.readline(_LONGEST_LINE)).endswith(b"\n"):
                offset += len(line)
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict):
                    yield record, offset
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if len(line) == _LONGEST_LINE:
        raise UserError(f"{_place(path, offset + 1)}: is longer than {_LONGEST_LINE} bytes")


def read_metric_lines(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the lines of a `metrics.jsonl` as `read_lines` does, after a comparison with their schema.

    Raises:
        UserError: a step, a time or a metric is no number; names the line.
    """
    for record, end in read_lines(path, offset):
        _check(record, MetricLine, path, end)
        _check(record, _Values, path, end)
        yield record, end


def read_events(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the lines of a `tracking.jsonl` as `read_lines` does, after a comparison with their schemas.

    Raises:
        UserError: an event lacks a key, or has another value than the schema says; names the line.
    """
    for record, end in read_lines(path):
        _check(record, _Event, path, end)
        _check(record, _EVENTS.get(record["event"], _Event), path, end)
        yield record, end


def check_record(run_dir: Path) -> None:
    """Read the record of a run to its end, before a run that continues it writes anything.

    Raises:
        UserError: a line of it is damaged; names the file.
    """
    for _ in read_metric_lines(run_dir / METRICS_FILE):
        pass
    for _ in read_events(run_dir / JOURNAL_FILE):
        pass


def _check(record: dict[str, Any], schema: Any, path: Path, end: int) -> None:
    try:
        check(record, schema, "")
    except UserError as error:  # the number of the line takes a second reading
        raise UserError(f"{_place(path, end)}{error}") from None


def _place(path: Path, end: int) -> str:
    """Return the name of the line that ends at a byte."""
    with path.open("rb") as file:
        number = sum(1 for line in iter(lambda: file.readline(), b"") if file.tell() < end)
    return f"{path}, line {number + 1}"


def inside_run(run_dir: Path, path: Path, folder: str | None) -> str:
    """Return a file's path relative to a run's directory, after copying a file from elsewhere into it.

    A record names files of its own run only, so no record can send others (docs/trust.md).

    Args:
        run_dir: directory of the run.
        path: path of the file. One outside of the run is copied to ``artifacts/<folder>/``.
        folder: folder of the file among the run's artifacts; `None` means the top.

    Raises:
        OSError: the file cannot be copied.
    """
    file, directory = path.resolve(), run_dir.resolve()
    if file.is_relative_to(directory):
        return str(file.relative_to(directory))
    name = Path(ARTIFACTS_FOLDER) / (folder or "") / path.name
    write_atomically(directory / name, path.read_bytes())
    return str(name)


class LineFile:
    """A file that grows by whole lines, each in one ``write``, so that a crash cannot lose a line already written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one line.

        Raises:
            OSError: the disk is full or gone; the lines before stay whole.
        """
        line = encode(record)
        if os.write(self._fd, line) != len(line):
            self.drop_partial_line()
            raise OSError(f"no room left for {self.path}")

    def try_lock(self) -> bool:
        """Lock the file for this process without waiting; return false if another process has it."""
        return take_lock(self._fd, self.path) is not False

    def cut(self, size: int) -> None:
        """Remove everything after the first ``size`` bytes, in one system call."""
        os.ftruncate(self._fd, size)

    def sync(self) -> None:
        """Wait until the file would survive a power cut."""
        os.fsync(self._fd)

    def size(self) -> int:
        """Return the number of bytes in the file."""
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        """Close the file, which frees its lock."""
        os.close(self._fd)

    def drop_partial_line(self) -> None:
        """Remove the end of the file that a crash left without a newline."""
        size = self.size()
        start = max(0, size - _LONGEST_LINE)
        tail = os.pread(self._fd, size - start, start)
        if tail and not tail.endswith(b"\n"):
            self.cut(start + tail.rfind(b"\n") + 1)


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return every line of a run's `metrics.jsonl`: ``step`` (int), ``time`` (seconds since 1970) and the metrics.

    The list is empty if nothing was logged. NaN and infinities come back as floats.
    """
    return [
        {name: value if name in RESERVED_METRIC_NAMES else decode_metric(value) for name, value in record.items()}
        for record, _ in read_metric_lines(Path(run_dir) / METRICS_FILE)
    ]
