"""Read sharded checkpoints in one process: folders with one file per process, which FSDP2 writes."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from typing_extensions import TypedDict

from lightning_moe.checkpoints.content import check_header
from lightning_moe.checkpoints.files import HEADER, INDEX
from lightning_moe.errors import UserError
from lightning_moe.file_schema import check, refuse_special
from lightning_moe.trust import is_file_name

Key = tuple[str | int, ...]  # where in the nested dictionary something stands


class Place(TypedDict):
    """Where in which shard something lies."""

    relative_path: str
    offset: Annotated[int, Interval(ge=0, lt=2**62)]
    length: Annotated[int, Interval(ge=0, lt=2**62)]


#: key of the header: every name in the state dict, in its order → the parameter's place in ``parameters()``, or None
#: for a buffer. The optimizer's state of one process is numbered so; in the shards it goes by name.
PARAMETER_NUMBERS = "parameter_numbers"


def read_header(folder: Path) -> dict[str, Any]:
    """Read a sharded checkpoint without weights and optimizer state: hyper-parameters, counters, data position.

    Raises:
        UserError: the header is missing or damaged.
    """
    refuse_special(folder / HEADER)
    with _damage_refused(f"{folder}: not a sharded checkpoint: {HEADER}"):
        header = torch.load(folder / HEADER, map_location="cpu", weights_only=True)
    if not isinstance(header, dict) or "hyper_parameters" not in header:
        raise UserError(f"{folder}: not written by lightning_moe: {HEADER} has no hyper_parameters")
    return header


def read_sharded(folder: Path) -> dict[str, Any]:
    """Read a sharded checkpoint as the one file that every strategy reads: whole tensors on the CPU, and all states.

    Raises:
        UserError: a part is missing, damaged, or refers to code; or an older version wrote the checkpoint.
    """
    checkpoint, index = read_header(folder), read_index(folder)
    if (problem := _damaged_shard(folder, index)) is not None:
        raise UserError(f"{folder}: not a complete checkpoint: it is {problem}")
    if PARAMETER_NUMBERS not in checkpoint:
        raise UserError(
            f"{folder}: written by an older version of lightning_moe: its {HEADER} has no {PARAMETER_NUMBERS}. "
            "Continue it with `fit` under FullyShardedStrategy, and use the checkpoint that this writes"
        )
    check_header(checkpoint, folder)
    numbers: dict[str, int | None] = checkpoint[PARAMETER_NUMBERS]
    with _damage_refused(f"{folder}: not a complete checkpoint: its {INDEX} and its {HEADER} contradict each other"):
        _add_shards(checkpoint, folder, index, numbers)
    return checkpoint


def _add_shards(checkpoint: dict[str, Any], folder: Path, index: Metadata, numbers: Mapping[str, int | None]) -> None:
    """Add weights and optimizer states to the header's content."""
    content = _load(folder, index, tensors=True)
    weights = content.pop("state_dict")
    if weights.keys() != numbers.keys():
        raise UserError(f"{folder}: its weights do not fit its {HEADER}: {sorted(weights.keys() ^ numbers.keys())}")
    checkpoint["state_dict"] = {name: weights[name] for name in numbers}
    optimizers = [content[key] for key in sorted(content)]
    for state in optimizers:
        state["param_groups"] = [state["param_groups"][i] for i in sorted(state["param_groups"])]
        state["state"] = {numbers[name]: entry for name, entry in state["state"].items()}
        for group in state["param_groups"]:
            group["params"] = [numbers[name] for name in group["params"]]
    checkpoint["optimizer_states"] = optimizers


@contextmanager
def _damage_refused(problem: str) -> Iterator[None]:
    """Turn whatever a file's content makes torch or pickle raise inside the block into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(f"{problem}: {reason}") from error


def read_index(folder: Path) -> Metadata:
    """Read what lies where in a sharded checkpoint.

    Raises:
        UserError: the index is missing or damaged, or holds more than an index does.
    """
    refuse_special(folder / INDEX)
    with _damage_refused(f"{folder}: not a sharded checkpoint: {INDEX}"):
        with (folder / INDEX).open("rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, Metadata):
            raise UserError(f"{folder}: not a sharded checkpoint: {INDEX} is a {type(index).__name__}")
        _check_index(index, folder)
    return index


def _check_index(index: Metadata, folder: Path) -> None:
    """Refuse an index whose parts have other types, or whose tensors are larger than all files together."""
    where = f"{folder}: not a sharded checkpoint: {INDEX}"
    check(index.planner_data, dict[str, Key], f"{where}: planner_data")
    if index.state_dict_metadata.keys() != index.planner_data.keys():
        raise UserError(f"{where}: planner_data and state_dict_metadata have other keys")
    for place in (index.storage_data or {}).values():
        check(vars(place), Place, f"{where}: storage_data")
    size = 0
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            size += torch.empty(entry.size, dtype=entry.properties.dtype, device="meta").nbytes
        elif not isinstance(entry, BytesStorageMetadata):
            raise UserError(f"{where}: state_dict_metadata: {key} is a {type(entry).__name__}")
    there = sum(path.stat().st_size for path in folder.iterdir())
    if size > there:
        raise UserError(f"{where}: its tensors take {size} bytes, but the folder has {there}")


def damage(folder: Path) -> str | None:
    """Return what is wrong with a sharded checkpoint, or None, without reading its tensors.

    What is not a tensor is read, and must be plain data: torch's own loader would run code.
    """
    try:
        index = read_index(folder)
        problem = _damaged_shard(folder, index)
        if problem is None:
            _load(folder, index, tensors=False)
    except UserError as error:
        return f"damaged: {error}"
    return problem


def _damaged_shard(folder: Path, index: Metadata) -> str | None:
    """Return what is wrong with the first shard that is missing or shorter than the index says, or `None`."""
    ends: dict[str, int] = {}
    for place in (index.storage_data or {}).values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        if not is_file_name(name):
            return f"damaged: its {INDEX} names {name!r}, which is no file of this folder"
        path = folder / name
        if not path.is_file():
            return f"incomplete: it has no {name}"
        if path.stat().st_size < end:
            return f"truncated: {name} has {path.stat().st_size} bytes of {end}"
    return None


def _load(folder: Path, index: Metadata, tensors: bool) -> dict[str, Any]:
    """Read the content of the shards, nested as it was saved; without ``tensors``, all but these."""
    flat: dict[str, Any] = {}
    for key, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            flat[key] = None
        elif tensors:
            flat[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    planner = _Planner()
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # one process is what is meant
            load(flat, storage_reader=_Reader(folder, index), planner=planner, no_dist=True)
    except CheckpointException as error:
        cause = str(next(iter(error.failures.values()))[0]).splitlines()
        raise UserError(f"{folder}: its shards are damaged: {cause[0] if cause else error}") from error
    nested: dict[Any, Any] = {}
    for key, value in (flat | planner.objects).items():
        *parents, last = index.planner_data[key]
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return nested


class _Reader(FileSystemReader):
    """A reader with an index that has been read already: torch's own reader unpickles whatever the file says."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._index.storage_meta = StorageMeta(load_id=self.load_id)
        return self._index


class _Planner(DefaultLoadPlanner):
    """A planner that keeps what is not a tensor in ``objects``, read without running code."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)
        self.objects: dict[str, Any] = {}

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.objects[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler that takes the classes of an index and torch's dtypes only."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = (module, name) in _INDEX_CLASSES
        found = super().find_class(module, name) if allowed or module == "torch" else None
        if not (allowed or isinstance(found, torch.dtype)):
            raise pickle.UnpicklingError(f"refers to {module}.{name}, which is no part of an index")
        return found


_INDEX_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
    (FileSystemReader.__module__, "_StorageInfo"),
    *(
        (Metadata.__module__, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
