"""Reading the complete configuration of a run, its ``config.yaml``, where it is not parsed anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

import yaml
from annotated_types import Interval
from typing_extensions import TypedDict

from lightning_moe.config.yaml_text import check_yaml
from lightning_moe.errors import UserError
from lightning_moe.file_schema import check, read_text
from lightning_moe.filenames import CONFIG_FILE

Whole = Annotated[int, Interval(ge=0, lt=2**63)]


class _Class(TypedDict):
    class_path: str
    init_args: NotRequired[dict[str, Any] | None]


class _Model(TypedDict):
    decoder: NotRequired[dict[str, Any]]
    routing: _Class | None


class _Data(TypedDict):
    corpus: NotRequired[_Class | str]
    global_batch_size: NotRequired[Whole]
    validation_batch_size: NotRequired[Whole]


class _Trainer(TypedDict):
    limit_val_batches: NotRequired[int | float | None]
    accumulate_grad_batches: NotRequired[Annotated[int, Interval(gt=0, lt=2**63)]]
    num_nodes: NotRequired[Annotated[int, Interval(gt=0, lt=2**31)]]
    devices: NotRequired[int | str | list[int]]


class RunConfig(TypedDict):
    """The keys that are read from it; each run's own file has many more."""

    seed_everything: Annotated[int, Interval(ge=0, lt=2**63)] | bool
    model: _Model
    data: _Data
    trainer: _Trainer


def read_config(folder: Path, source: str | None = None) -> Mapping[str, Any]:
    """Read the configuration in a run's folder.

    Args:
        folder: folder of the run.
        source: name of the run, for the message; by default the folder.

    Raises:
        UserError: it is missing, is not YAML, or lacks a key of `RunConfig`.
    """
    where = f"{source}: {CONFIG_FILE}" if source else str(folder / CONFIG_FILE)
    try:
        text = read_text(folder / CONFIG_FILE, where)
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    return parse_config(text, where)


def parse_config(text: str, where: str) -> Mapping[str, Any]:
    """Parse the content of a run's configuration.

    Args:
        text: YAML.
        where: name of the file, for the message.

    Raises:
        UserError: it is not YAML, or lacks a key of `RunConfig`.
    """
    try:
        check_yaml(text)
        content: Mapping[str, Any] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # a date such as 2026-99-99; a list as key
        raise UserError(f"{where}: is not YAML: {' '.join(str(error).split())}") from None
    check(content, RunConfig, where)
    return content
