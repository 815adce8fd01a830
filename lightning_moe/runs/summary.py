"""Reading a run's ``summary.json``, which `training.summary.Summary` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

from annotated_types import Interval, Len
from typing_extensions import TypedDict

from lightning_moe.errors import UserError
from lightning_moe.file_schema import check, read_json
from lightning_moe.filenames import SUMMARY_FILE

Whole = Annotated[int, Interval(ge=0, lt=2**63)]


class SegmentContent(TypedDict):
    """A `config.settings.Segment`: key → values before and in this part of a run."""

    step: Whole
    changed: dict[str, Annotated[list[Any], Len(2, 2)]]


class _Numbers(TypedDict):
    """What has been there in every version; a metric is null where it could not be measured."""

    steps: NotRequired[Whole]
    loss: NotRequired[float | None]
    perplexity: NotRequired[float | None]
    bits_per_byte: NotRequired[float | None]
    tokens_per_second: NotRequired[float | None]
    layers: NotRequired[dict[str, dict[str, float | None]]]
    total_parameters: NotRequired[Whole]
    active_parameters: NotRequired[Whole]


class _Data(TypedDict):
    fingerprint: str | int
    tokenizer: str | int
    validation_documents: Whole
    validation_tokens: Whole
    validation_bytes: Whole


class _Comparable(_Numbers):
    """What a comparison needs too."""

    flops_per_token: Whole
    train_tokens: Whole
    world_size: Whole
    micro_batch_size: Whole
    segments: list[SegmentContent]
    data: _Data


def read_summary(folder: Path) -> Mapping[str, Any]:
    """Read the summary of a finished run.

    Raises:
        UserError: it is missing, or holds something else.
    """
    return _read(folder, _Numbers, str(folder / SUMMARY_FILE))


def read_comparable_summary(folder: Path, source: str) -> Mapping[str, Any]:
    """Read the summary of a finished run, with all that a comparison needs.

    Args:
        folder: folder with the file.
        source: name of the run, for the message.

    Raises:
        UserError: it is missing, holds something else, or an older version wrote it.
    """
    where = f"{source}: {SUMMARY_FILE}"
    content = _read(folder, _Numbers, where)
    for key in ("data", "train_tokens", "flops_per_token", "world_size", "micro_batch_size", "segments"):
        if key not in content:
            raise UserError(f"{source}: its {SUMMARY_FILE} has no {key!r}: the run was made by an older version")
    check(content, _Comparable, where)
    return content


def _read(folder: Path, schema: Any, where: str) -> Mapping[str, Any]:
    try:
        content = read_json(folder / SUMMARY_FILE, dict[str, Any])
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    check(content, schema, where)
    return content
