"""A suite of cases that runs to its end whatever a case does: each is one row, an error is a row too."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lightning_moe.report.tables import text_table

#: names of what a case may measure → heading and format
COLUMNS: dict[str, tuple[str, str]] = {
    "milliseconds": ("ms", ".3f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "mfu": ("MFU", ".1%"),
    "peak_bytes": ("peak GB", ".2f"),
    "waits": ("waits", "d"),
    "launches": ("launches", "d"),
}


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Args:
        group: what is compared, such as ``layer d12``.
        name: name of the case in its group.
        measure: function that builds what it needs, measures, and returns numbers by the names of `COLUMNS`.
    """

    group: str
    name: str
    measure: Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Result:
    """What came of a case.

    Args:
        group: group of the case.
        name: name of the case.
        values: numbers by the names of `COLUMNS`; empty if the case failed or was left out.
        error: error in one line, or why the case was left out; `None` if it ran.
        seconds: time that the case took in all, with building and compiling.
    """

    group: str
    name: str
    values: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0


def run_cases(cases: Iterable[Case], max_seconds: float, device: torch.device) -> Iterator[Result]:
    """Yield the result of each case; nothing of a case stays on the device after it.

    Args:
        cases: cases, the most important first.
        max_seconds: time after which no further case begins; the others are rows that say so.
        device: device whose memory is freed between cases.
    """
    begun = time.monotonic()
    for case in cases:
        started = time.monotonic()
        if started - begun >= max_seconds:
            yield Result(case.group, case.name, error=f"left out: --max_seconds {max_seconds:g} are over")
            continue
        values, error = _measured(case)
        _free(device)
        yield Result(case.group, case.name, values, error, time.monotonic() - started)


def _measured(case: Case) -> tuple[dict[str, float], str | None]:
    """Return a case's numbers and its error. What the error's traceback holds is gone when this function has ended."""
    try:
        return dict(case.measure()), None
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        return {}, f"{type(error).__name__}: {first}"[:300]


def _free(device: torch.device) -> None:
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def line(result: Result) -> str:
    """Return a result as a line of text, to print when it is there."""
    cells = [f"{COLUMNS[name][0]} {_cell(name, value)}" for name, value in result.values.items()]
    return f"{result.group}: {result.name}: {result.error or ', '.join(cells)} ({result.seconds:.1f} s)"


def table(results: Iterable[Result]) -> str:
    """Return all results as a table; an error stands after the row that it belongs to."""
    rows = [["group", "case", *(heading for heading, _ in COLUMNS.values()), ""]]
    for result in results:
        cells = [_cell(name, result.values[name]) if name in result.values else "" for name in COLUMNS]
        rows.append([result.group, result.name, *cells, result.error or ""])
    return text_table(rows, right=range(2, 2 + len(COLUMNS)))


def document(results: Iterable[Result], facts: Mapping[str, Any]) -> str:
    """Return all results as JSON, with what is known of the machine and the sizes."""
    return json.dumps({**facts, "results": [asdict(result) for result in results]}, indent=1, default=str)


def _cell(name: str, value: float) -> str:
    scaled = value / 1e9 if name == "peak_bytes" else value
    form = COLUMNS[name][1]
    return format(int(scaled) if form == "d" else scaled, form)
