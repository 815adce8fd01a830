"""``export``: a checkpoint as a folder that `transformers` loads, or as safetensors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lightning_moe.checkpoints.exported import EXPORT_CONFIG_FILE, ORIGIN_KEY, TOKENIZER_FILE, bundled_tokenizer
from lightning_moe.cli.arguments import command_parser
from lightning_moe.errors import UserError
from lightning_moe.filenames import CONFIG_FILE, SUMMARY_FILE

DESCRIPTION = """\
hf: a folder for transformers (AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)): weights, routing
  state in fp32, tokenizer, the model's code, a card filled from the run. Its code needs torch and transformers only.
safetensors: weights and routing state as one file; the same as `convert --format safetensors`."""


def run(command: str, args: list[str]) -> None:
    """Write the folder or file.

    Raises:
        UserError: the checkpoint or the tokenizer cannot be used, the output exists, or the rule cannot be exported.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    options = _parser(command).parse_args(args)
    output = Path(options.output)
    if options.format == "safetensors":
        from lightning_moe.cli import convert

        flags = ["--overwrite"] if options.overwrite else []
        convert.run("convert", [options.ckpt_path, options.output, "--format=safetensors", *flags])
        return
    if output.exists() and not options.overwrite:
        raise UserError(f"--output {output}: exists; --overwrite replaces it.")
    if output.exists() and not _is_own(output):
        raise UserError(f"--output {output}: exists and is not an exported folder; it is not replaced.")

    from lightning_moe.checkpoints.read import read_verified
    from lightning_moe.data import Tokenizer
    from lightning_moe.export import export_folder
    from lightning_moe.export.card import model_card
    from lightning_moe.module import LanguageModel
    from lightning_moe.runs.folder import run_of_checkpoint
    from lightning_moe.runs.loading import check_tokenizer, run_data

    ckpt_path = Path(options.ckpt_path)
    checkpoint = read_verified(ckpt_path)
    LanguageModel.from_checkpoint(checkpoint)  # it is whole, and fits its configuration
    given = options.tokenizer or bundled_tokenizer(ckpt_path)
    tokenizer_file = Path(given) if given else run_data(ckpt_path, "--tokenizer").store.directory / TOKENIZER_FILE
    check_tokenizer(Tokenizer.load(tokenizer_file), checkpoint, "--tokenizer")
    run_folder = run_of_checkpoint(ckpt_path)
    card = model_card(
        run_folder.name if run_folder else ckpt_path.stem,
        checkpoint["hyper_parameters"],
        checkpoint["global_step"],
        _json(run_folder / SUMMARY_FILE) if run_folder else {},
        _facts(run_folder),
    )
    try:
        export_folder(output, checkpoint, tokenizer_file, card, options.overwrite)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error}") from error
    print(f"{output}: AutoModelForCausalLM.from_pretrained({str(output)!r}, trust_remote_code=True)")


def _parser(command: str) -> argparse.ArgumentParser:
    parser = command_parser(command, DESCRIPTION)
    parser.add_argument("--ckpt_path", required=True, metavar="PATH", help="the checkpoint")
    parser.add_argument("--output", required=True, metavar="PATH", help="folder (hf) or file (safetensors) to write")
    parser.add_argument("--format", choices=("hf", "safetensors"), default="hf", help="(default: hf)")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json (default: the run's)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier export wrote")
    return parser


def _is_own(folder: Path) -> bool:
    return ORIGIN_KEY in _json(folder / EXPORT_CONFIG_FILE)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _facts(run_folder: Path | None) -> dict[str, str]:
    """What the run's configuration says of its data and seed."""
    if run_folder is None:
        return {}
    import yaml

    config = yaml.safe_load((run_folder / CONFIG_FILE).read_text(encoding="utf-8"))
    corpus = str(config["data"]["corpus"]["class_path"]).rpartition(".")[2]
    return {"corpus": corpus, "seed": str(config["seed_everything"])}
