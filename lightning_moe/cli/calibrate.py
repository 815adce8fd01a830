"""``calibrate``: set the thresholds of a checkpoint or a released model from the quantiles of its router's scores."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moe.cli.arguments import (
    add_checkpoint_or_model,
    add_shared,
    command_parser,
    read_text,
    real_number,
    refuse_existing,
)
from lightning_moe.errors import UserError
from lightning_moe.filenames import CHECKPOINT_FOLDER, CONFIG_FILE, LAST_CHECKPOINT

if TYPE_CHECKING:
    import numpy as np

    from lightning_moe.calibrate import Target
    from lightning_moe.data.sharded_tokens import ShardedTokens

DESCRIPTION = """\
Set thresholds to the exact quantiles of the router's scores on text, layer by layer.

--ckpt_path: write the result as the folder of a run. A rule that chooses by thresholds (expert threshold, expert
choice, and those derived from them) stays and may get another number of experts per token. One that takes the top-k
(token choice) becomes expert threshold with the same experts. A dense model is upcycled: its networks are cut into
shared and routed experts, with new routers.

--model: write a small folder of thresholds, which --model of the other commands takes in the place of the model, and
lightning_moe.hf.route_by_thresholds in your own programs. Nothing is written into the model's folder.

Text: the training text of the checkpoint's run, or of the default corpus for a released model, or --text, cut into
windows. Every second window calibrates; the others show how far the experts' loads are from their target on unused
text. For a checkpoint outside of a run's folder, give --text and --tokenizer."""


def run(command: str, args: list[str]) -> None:
    """Write the new checkpoint or thresholds; print loss and loads before and after.

    Raises:
        UserError: the checkpoint or model, the text, the tokenizer or the output cannot be used.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    options = _parser(command).parse_args(args)
    from lightning_moe.training.quiet import quiet

    quiet()
    refuse_existing(options.output_dir)
    if options.model is not None:
        from lightning_moe.cli.calibrate_model import calibrate_model

        calibrate_model(options)
        return
    if options.with_model:
        raise UserError("--with_model: belongs to --model; a calibrated checkpoint always has its weights with it.")
    if options.balanced:
        raise UserError("--balanced: belongs to --model; the experts of a checkpoint always get equal loads.")
    _calibrate_checkpoint(options)


def _calibrate_checkpoint(options: argparse.Namespace) -> None:
    from lightning_moe.calibrate import calibrate_and_measure, target_model
    from lightning_moe.checkpoints.read import read_verified
    from lightning_moe.module import LanguageModel
    from lightning_moe.runs.config import read_config
    from lightning_moe.runs.folder import run_of_checkpoint
    from lightning_moe.runs.loading import rule_name, to_device

    ckpt_path, output_dir = options.ckpt_path, options.output_dir
    folder = run_of_checkpoint(ckpt_path)
    config = None if folder is None else read_config(folder)
    checkpoint = read_verified(ckpt_path)
    source = to_device(LanguageModel.from_checkpoint(checkpoint, str(ckpt_path)), options.device).decoder
    rates = options.num_experts_per_token
    target = target_model(
        checkpoint["hyper_parameters"],
        checkpoint["state_dict"],
        rates[0] if rates is not None and len(rates) == 1 else rates,
        options.seed,
    )
    decoder = to_device(target.model, options.device).decoder
    if not any(True for _ in decoder.moe_layers()):
        sizes = target.hyper_parameters["decoder"]
        raise UserError(
            f"--ckpt_path {ckpt_path}: has no MoE layer to calibrate: num_layers={sizes['num_layers']}, of which "
            f"num_dense_layers={sizes['num_dense_layers']} are dense"
        )
    length = options.sequence_length or source.max_sequence_length
    if length > source.max_sequence_length:
        raise UserError(f"--sequence_length {length}: the model's context is {source.max_sequence_length}.")
    tokens, validation = _text(options, checkpoint)
    outcome = calibrate_and_measure(source, lambda: decoder, tokens, validation, length, options.max_tokens)
    print(f"{ckpt_path}: {rule_name(checkpoint)} -> {type(next(decoder.moe_layers()).rule).__name__}")
    print(f"calibrated on {outcome.num_tokens:,} tokens of {options.text or 'its training text'}\n")
    print(outcome.table())
    report = {
        "ckpt_path": str(options.ckpt_path),
        "text": options.text or "the run's training text",
        "num_experts_per_token": options.num_experts_per_token,
        **outcome.to_json(),
    }
    _write(output_dir, config, checkpoint, target, report)
    print(f"\ncheckpoint   {output_dir / CHECKPOINT_FOLDER / LAST_CHECKPOINT}")


def _parser(command: str) -> argparse.ArgumentParser:
    parser = command_parser(command, DESCRIPTION)
    add_checkpoint_or_model(parser)
    add_shared(parser, "--output_dir", ", as of a run, or of thresholds", required=True)
    add_shared(parser, "--text", " (default: the training text)")
    add_shared(parser, "--tokenizer")
    add_shared(parser, "--max_tokens", "; as many more show the loads on unused text", default=524_288)
    add_shared(parser, "--sequence_length", " (default: the model's context; with --model, at most 1024)")
    parser.add_argument(
        "--num_experts_per_token",
        type=real_number(0, open_low=True),
        nargs="+",
        metavar="K",
        help="new mean number of experts per token, one value or one per MoE layer (default: as trained)",
    )
    parser.add_argument(
        "--balanced",
        action="store_true",
        help="with --model, give all experts equally many tokens; by default each gets as many as from the model's own "
        "top-k",
    )
    parser.add_argument(
        "--with_model",
        action="store_true",
        help="with --model, copy the model's files into the folder too, which then is a whole model",
    )
    add_shared(parser, "--device")
    add_shared(parser, "--seed", " for the routers of an upcycled dense model")
    return parser


def _text(
    options: argparse.Namespace, checkpoint: dict[str, Any]
) -> tuple[np.ndarray | ShardedTokens, ShardedTokens | None]:
    """Return token ids for calibration, and those of the validation text if there is a run."""
    import numpy as np

    from lightning_moe.runs.loading import check_tokenizer, text_source

    tokenizer, data = text_source(options.ckpt_path, checkpoint, options.tokenizer, options.text is not None)
    check_tokenizer(tokenizer, checkpoint, "--tokenizer, and --text")
    if options.text is not None:
        ids = tokenizer.encode(read_text("--text", options.text))
        tokens: np.ndarray | ShardedTokens = np.array(ids, dtype=np.int64)
    else:
        assert data is not None
        tokens = data.store.tokens("train")
    return tokens, None if data is None else data.store.tokens("validation")


def _write(
    output_dir: Path,
    source: Mapping[str, Any] | None,
    checkpoint: dict[str, Any],
    target: Target,
    report: dict[str, Any],
) -> None:
    """Write the folder of a run: checkpoint, configuration (if the source has one), report."""
    import torch

    from lightning_moe.atomic import atomic_folder
    from lightning_moe.calibrate import REPORT_FILE
    from lightning_moe.config.yaml_text import dump_yaml

    state = {name: value.cpu() for name, value in target.model.state_dict().items()}
    changed = {**checkpoint, "state_dict": state, "hyper_parameters": target.hyper_parameters}
    if not target.same_parameters:  # for --model.init_from, not for resuming
        changed = {name: value for name, value in changed.items() if name not in ("optimizer_states", "lr_schedulers")}
    config = None
    if source is not None:
        config = {**source}
        config["model"] = {**config["model"]}
        healed = target.hyper_parameters.get("pretrained")
        if healed is None:
            sizes = {**config["model"].get("decoder", {}), **target.hyper_parameters["decoder"]}
            linked = ("vocab_size", "max_sequence_length")  # these follow from `data`
            config["model"]["decoder"] = {name: value for name, value in sizes.items() if name not in linked}
        else:
            number = healed["num_experts_per_token"]
            config["model"]["pretrained"] = {**config["model"]["pretrained"], "num_experts_per_token": number}
        config["model"]["routing"] = target.hyper_parameters["routing"]
        config["run_name"], config["output_dir"] = output_dir.name, str(output_dir.parent)
    try:
        with atomic_folder(output_dir) as new:
            if config is not None:
                (new / CONFIG_FILE).write_text(dump_yaml(config), encoding="utf-8")
            (new / REPORT_FILE).write_text(json.dumps(report, indent=1), encoding="utf-8")
            (new / CHECKPOINT_FOLDER).mkdir()
            torch.save(changed, new / CHECKPOINT_FOLDER / LAST_CHECKPOINT)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be written: {error}") from error
