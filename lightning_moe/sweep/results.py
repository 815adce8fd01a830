"""The metrics of a trial's run so far, read from its folder."""

from __future__ import annotations

import math
from pathlib import Path

from lightning_moe.filenames import METRICS_FILE
from lightning_moe.runs.summary import read_summary
from lightning_moe.tracking.files import decode_metric, read_metric_lines

SUMMARY_PREFIX = "summary/"


class MetricFollower:
    """A reader of one metric while the run's ``metrics.jsonl`` grows.

    Args:
        run_folder: folder of the run.
        metric: name of the metric.
    """

    def __init__(self, run_folder: Path, metric: str) -> None:
        self._path, self._metric, self._offset = run_folder / METRICS_FILE, metric, 0

    def new_values(self) -> list[tuple[int, float]]:
        """Return the (step, value) pairs since the last call."""
        values = []
        for record, end in read_metric_lines(self._path, self._offset):
            self._offset = end
            if self._metric in record:
                values.append((int(record["step"]), decode_metric(record[self._metric])))
        return values


def final_values(run_folder: Path) -> dict[str, float]:
    """Return the last value of each metric of a finished run, and the numbers of its summary as ``summary/<name>``."""
    values: dict[str, float] = {}
    for record, _ in read_metric_lines(run_folder / METRICS_FILE):
        values |= {name: decode_metric(value) for name, value in record.items() if name not in ("step", "time")}
    for name, value in read_summary(run_folder).items():
        if isinstance(value, int | float):
            values[f"{SUMMARY_PREFIX}{name}"] = float(value)
    return {name: value for name, value in values.items() if not math.isnan(value)}
