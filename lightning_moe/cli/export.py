"""``export``: a checkpoint as a folder that `transformers` loads."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moe.checkpoints.exported import EXPORT_CONFIG_FILE, ORIGIN_KEY
from lightning_moe.cli.arguments import add_shared, command_parser, home_path, refuse_unwritable
from lightning_moe.errors import UserError
from lightning_moe.filenames import SUMMARY_FILE

if TYPE_CHECKING:
    from lightning_moe.hf.healing import Healing

DESCRIPTION = """\
Write a checkpoint as a folder for transformers: AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True). It
holds weights, routing state in fp32, tokenizer, the model's code (which needs torch and transformers only), and a card
with the facts of the run. A healed model (model.pretrained) becomes a folder of its own family, with its thresholds in
routing.json and routing.safetensors. For weights and routing state as one safetensors file see `convert`."""


def run(command: str, args: list[str]) -> None:
    """Write the folder.

    Raises:
        UserError: the checkpoint or the tokenizer cannot be used, the output exists, or the rule cannot be exported.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    options = _parser(command).parse_args(args)
    ckpt_path, output = options.ckpt_path, options.output
    if output.exists() and not options.overwrite:
        raise UserError(f"--output {output}: exists; --overwrite replaces it.")
    if output.exists() and not _is_own(output):
        raise UserError(f"--output {output}: exists and is not an exported folder; it is not replaced.")
    refuse_unwritable(output, "--output")

    from lightning_moe.checkpoints.read import read_verified
    from lightning_moe.export import export_folder
    from lightning_moe.export.card import model_card
    from lightning_moe.module import LanguageModel
    from lightning_moe.runs.folder import run_of_checkpoint
    from lightning_moe.runs.loading import check_tokenizer, tokenizer_of
    from lightning_moe.runs.summary import read_summary

    checkpoint = read_verified(ckpt_path)
    model = LanguageModel.from_checkpoint(checkpoint, str(ckpt_path))  # it is whole, and fits its configuration
    if model.healing is not None:
        _export_healed(options, model.healing, checkpoint)
        return
    tokenizer = tokenizer_of(ckpt_path, checkpoint, options.tokenizer, "--tokenizer")
    check_tokenizer(tokenizer, checkpoint, "--tokenizer")
    run_folder = run_of_checkpoint(ckpt_path)
    card = model_card(
        run_folder.name if run_folder else ckpt_path.stem,
        checkpoint["hyper_parameters"],
        checkpoint["global_step"],
        read_summary(run_folder) if run_folder and (run_folder / SUMMARY_FILE).exists() else {},
        _facts(run_folder),
    )
    try:
        export_folder(output, checkpoint, tokenizer, card, options.overwrite)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error}") from error
    print(f"{output}: AutoModelForCausalLM.from_pretrained({str(output)!r}, trust_remote_code=True)")


def _export_healed(options: argparse.Namespace, healing: Healing, checkpoint: Mapping[str, Any]) -> None:
    """Write a healed model, which needs no code of this package where its own top-k is wanted."""
    from lightning_moe.hf.save import save_healed

    output = options.output
    if options.tokenizer is not None:
        raise UserError(
            f"--tokenizer {options.tokenizer}: a healed model keeps the tokenizer of {healing.config.path}."
        )
    data = checkpoint.get("TextDataModule", {}).get("data", {})
    facts = {
        "healed_from": healing.config.path,
        "digest": healing.digest,
        "steps": checkpoint["global_step"],
        "train": list(healing.config.train),
        "routing": type(healing.lm.layers[0].rule).__name__,
        "data": data.get("fingerprint"),
    }
    try:
        save_healed(healing, output, facts, options.overwrite)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error}") from error
    print(f"{output}: --model {output}; in Python from_pretrained({str(output)!r}), then route_by_thresholds")


def _parser(command: str) -> argparse.ArgumentParser:
    parser = command_parser(command, DESCRIPTION)
    add_shared(parser, "--ckpt_path", type=home_path, required=True)
    add_shared(parser, "--output", required=True)
    add_shared(parser, "--tokenizer")
    add_shared(parser, "--overwrite")
    return parser


def _is_own(folder: Path) -> bool:
    from lightning_moe.file_schema import read_json
    from lightning_moe.hf.sidecar import SIDECAR_FILE

    try:
        healed = (folder / SIDECAR_FILE).is_file() and "healed_from" in read_json(
            folder / SIDECAR_FILE, dict[str, Any]
        )["facts"]
        return healed or ORIGIN_KEY in read_json(folder / EXPORT_CONFIG_FILE, dict[str, Any])
    except (FileNotFoundError, UserError, KeyError, TypeError):
        return False


def _facts(run_folder: Path | None) -> dict[str, str]:
    """Return what the run's configuration says about its data and seed."""
    if run_folder is None:
        return {}
    from lightning_moe.runs.config import read_config

    config = read_config(run_folder)
    corpus = config["data"].get("corpus", "")
    name = corpus if isinstance(corpus, str) else corpus["class_path"]
    return {"corpus": name.rpartition(".")[2], "seed": str(config["seed_everything"])}
