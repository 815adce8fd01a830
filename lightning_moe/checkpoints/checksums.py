"""Checksums of a sharded checkpoint, which torch writes without any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_moe.atomic import write_atomically
from lightning_moe.checkpoints.files import CHECKSUMS, HEADER, INDEX
from lightning_moe.checksums import digest


def write_checksums(folder: Path, problem: str | None = None) -> None:
    """Write the checksums of a sharded checkpoint that the processes have just written. Collective.

    Each process reads back what it wrote itself.

    Args:
        folder: folder of the checkpoint.
        problem: what kept this process from writing its part; `None` if nothing did.

    Raises:
        OSError: one of the processes has a problem; all of them raise it.
    """
    rank = dist.get_rank()
    own: dict[str, Any] = {}
    if problem is None:
        own, problem = _checksums(folder, rank)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (own, problem))
    answer = [next((theirs for _, theirs in parts if theirs), None)]
    if rank == 0 and answer[0] is None:
        answer[0] = _write(folder, {name: found for own, _ in parts for name, found in own.items()})
    dist.broadcast_object_list(answer, src=0)
    if answer[0] is not None:
        raise OSError(answer[0])


def _checksums(folder: Path, rank: int) -> tuple[dict[str, Any], str | None]:
    """Return the checksums of the files that a rank has written, or why they cannot be read."""
    common = (folder / INDEX, folder / HEADER) if rank == 0 else ()
    try:
        return {path.name: digest(path) for path in (*folder.glob(f"__{rank}_*.distcp"), *common)}, None
    except OSError as error:
        return {}, str(error)


def _write(folder: Path, checksums: dict[str, Any]) -> str | None:
    try:
        write_atomically(folder / CHECKSUMS, json.dumps(checksums).encode())
    except OSError as error:
        return str(error)
    return None
