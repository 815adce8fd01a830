"""The file of recorded routes: safetensors, with JSON in its header.

The tensors are those of `Routes`. ``experts`` is packed: uint8 [R, P, L, ⌈E/8⌉], eight experts in a byte, the first in
its highest bit (numpy's ``packbits``). The header's key ``routes`` is JSON: ``version``, and a `Made` as ``made``.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from lightning_moe.atomic import write_atomically
from lightning_moe.errors import UserError
from lightning_moe.file_schema import parse_json, refuse_special
from lightning_moe.replay.routes import Made, Routes

HEADER_KEY = "routes"
DTYPES = {
    "tokens": torch.int64,
    "prompt_lengths": torch.int64,
    "lengths": torch.int64,
    "experts": torch.uint8,
    "log_probs": torch.float32,
}


class _Header(TypedDict):
    version: Literal[1]
    made: Made


def write_routes(path: Path, routes: Routes) -> None:
    """Write the file, which takes the place of an existing one when it is complete.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    packed = torch.from_numpy(np.packbits(routes.experts.numpy(), axis=-1))
    tensors = {name: getattr(routes, name).contiguous() for name in DTYPES if name != "experts"}
    header = json.dumps({"version": 1, "made": asdict(routes.made)})
    write_atomically(path, save({**tensors, "experts": packed}, {HEADER_KEY: header}))


def read_routes(path: Path) -> Routes:
    """Read the file.

    Raises:
        UserError: there is no such file, it is damaged, or it is not one of these.
    """
    from safetensors import SafetensorError, safe_open

    refuse_special(path)
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(HEADER_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a whole file of routes (`generate --save_routes` writes one): {reason}") from None
    if header is None:
        raise UserError(f"{path}: holds no routes; `generate --save_routes` writes a file that does.")
    made = parse_json(header, _Header, f"{path}: {HEADER_KEY}")["made"]
    problem = _problem(tensors, made)
    if problem is not None:
        raise UserError(f"{path}: not a whole file of routes: {problem}")
    unpacked = np.unpackbits(tensors["experts"].numpy(), axis=-1, count=made.num_experts)
    return Routes(**{**tensors, "experts": torch.from_numpy(unpacked).bool()}, made=made)


def _problem(tensors: dict[str, Tensor], made: Made) -> str | None:
    """Return what is wrong with the tensors, or `None`."""
    if tensors.keys() != DTYPES.keys():
        return f"its tensors are {', '.join(sorted(tensors)) or 'none'}, not {', '.join(sorted(DTYPES))}"
    rows, positions = tensors["tokens"].shape if tensors["tokens"].dim() == 2 else (0, 0)
    if not rows or not positions:
        return f"tokens have the shape {list(tensors['tokens'].shape)}; must be [rows, positions]"
    width = -(-made.num_experts // 8)
    shapes = {
        "tokens": [rows, positions],
        "prompt_lengths": [rows],
        "lengths": [rows],
        "experts": [rows, positions, len(made.layers), width],
        "log_probs": [rows, positions],
    }
    for name, dtype in DTYPES.items():
        found = tensors[name]
        if list(found.shape) != shapes[name] or found.dtype != dtype:
            return f"{name} are {found.dtype} {list(found.shape)}; must be {dtype} {shapes[name]}"
    tokens, prompts, lengths = (tensors[name] for name in ("tokens", "prompt_lengths", "lengths"))
    if not (prompts.min() >= 1 and bool((prompts <= lengths).all()) and lengths.max() <= positions):
        return f"a prompt or a row has no length from 1 to {positions}"
    if not (tokens.min() >= 0 and tokens.max() < made.vocab_size):
        return f"a token is outside of the vocabulary of {made.vocab_size}"
    return None if bool((tensors["log_probs"] <= 0).all()) else "a log-probability is above 0, or no number"
