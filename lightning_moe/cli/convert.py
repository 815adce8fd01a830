"""``convert``: a checkpoint as one file that every strategy reads, or as safetensors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moe.checkpoints.exported import SAFETENSORS_SUFFIX, is_exported, origin
from lightning_moe.cli.arguments import add_shared, command_parser, home_path
from lightning_moe.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = """\
Write a checkpoint as one file; the suffix of --output says which kind.

FILE.safetensors: the weights in their precision and the routing state in fp32, without the optimizer. The metadata hold
  "step" and, as JSON, "config" (decoder, routing, optimizer, schedule) and "data".
any other name: a checkpoint file. From a sharded checkpoint (the folder that FSDP2 writes with
  save_distributed_checkpoint) it has optimizer state, counters and data position too; from an export, weights and
  routing state only. All commands read both kinds of folder as they are. The file is for moving, and for other
  programs: torch.load(FILE, weights_only=True)."""


def run(command: str, args: list[str]) -> None:
    """Write the file.

    Raises:
        UserError: there is no checkpoint, it is damaged, the file exists already, or there is nothing to convert.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    options = _parser(command).parse_args(args)
    source, target = options.ckpt_path, options.output
    safetensors = target.suffix == SAFETENSORS_SUFFIX  # readers know the kind by it
    _check(source, target, safetensors, options.overwrite)
    import torch

    from lightning_moe.atomic import atomic_open
    from lightning_moe.checkpoints.read import read_verified

    checkpoint = read_verified(source)  # a copy would have new checksums, and hide damage
    weights = checkpoint["state_dict"]
    try:
        with atomic_open(target) as file:
            if safetensors:
                from safetensors.torch import save

                file.write(save(_separate(weights), _metadata(checkpoint)))
            else:
                torch.save(checkpoint, file)
    except OSError as error:
        raise UserError(f"--output {target}: cannot be written: {error}") from error
    whole = not safetensors and checkpoint.get("optimizer_states")
    content = "with the optimizer's state" if whole else "weights and routing state"
    size, step = target.stat().st_size / 2**20, checkpoint["global_step"]
    print(f"{target}: {len(weights)} tensors, {content}, of step {step}; {size:.1f} MiB")


def _check(source: Path, target: Path, safetensors: bool, overwrite: bool) -> None:
    if not source.exists():
        raise UserError(f"--ckpt_path {source}: no such checkpoint.")
    if target.is_dir():
        raise UserError(f"--output {target}: is a folder; give the name of the file to write.")
    if target.exists() and not overwrite:
        raise UserError(f"--output {target}: exists; --overwrite replaces it.")
    if source.is_file() and not is_exported(source) and not safetensors:
        raise UserError(
            f"--ckpt_path {source}: is one file already; --output FILE{SAFETENSORS_SUFFIX} makes another kind."
        )


def _separate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without shared memory (tied embeddings), which safetensors does not take."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in weights.items():
        shared = tensor.data_ptr() in seen and tensor.numel() > 0
        separate[name] = tensor.clone() if shared else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return separate


def _metadata(checkpoint: dict[str, Any]) -> dict[str, str]:
    """Return the text for the header of a safetensors file."""
    from lightning_moe import __version__
    from lightning_moe.runs.loading import tokenizer_text

    texts = {key: json.dumps(value) for key, value in origin(checkpoint).items()}
    if (tokenizer := tokenizer_text(checkpoint)) is not None:
        texts["tokenizer"] = tokenizer
    return {"format": "pt", "lightning_moe": __version__, **texts}


def _parser(command: str) -> argparse.ArgumentParser:
    parser = command_parser(command, DESCRIPTION)
    add_shared(parser, "--ckpt_path", type=home_path, required=True)
    add_shared(parser, "--output", required=True)
    add_shared(parser, "--overwrite")
    return parser
