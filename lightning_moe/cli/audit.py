"""``audit``: whether a checkpoint's routing and output depend on anything but a token's own past."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moe.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_moe.data.tokenizer import Tokenizer
    from lightning_moe.model import Decoder

DESCRIPTION = """\
Feed text to a checkpoint, change what a token must not depend on (future tokens, other sequences of the batch, the
batch size, padding; decoding with the key/value cache), and report what changes in each layer's routing and in the
output. Runs on the CPU in float64, so that rounding does not hide or feign a leak.

Text: the validation text of the checkpoint's run, from the config.yaml of the run's folder; or --text, encoded with the
run's tokenizer. For a checkpoint outside of a run's folder give --text and --tokenizer."""


def run(command: str, args: list[str]) -> None:
    """Print the report; leave with exit code 1 if something leaks.

    Raises:
        UserError: the checkpoint, the text or the tokenizer cannot be used.
        SystemExit: code 1 on a leak, 2 on unknown options, 0 after ``--help``.
    """
    options = _parser(command).parse_args(args)
    from lightning_moe.cli.quiet import quiet

    quiet()
    from lightning_moe.audit import audit, format_report
    from lightning_moe.routing import Phase

    ckpt_path = Path(options.ckpt_path)
    decoder, rule = _load(ckpt_path)
    length = options.sequence_length or decoder.config.max_sequence_length
    ids = _text(ckpt_path, options.text, options.tokenizer, options.num_sequences, length)
    decoder.double()
    if int(ids.max()) >= decoder.config.vocab_size:
        raise UserError(
            f"token {int(ids.max())} in the text, but the checkpoint's model.decoder.vocab_size is "
            f"{decoder.config.vocab_size}: use the tokenizer that it was trained with."
        )
    findings = audit(decoder, ids, Phase(options.phase), options.seed)
    print(f"{ckpt_path}: {rule}, phase {options.phase}, {ids.shape[0]} sequences of {ids.shape[1]} tokens\n")
    print(format_report(findings))
    if any(finding.leaks for finding in findings):
        raise SystemExit(1)


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m lightning_moe {command}",
        description=DESCRIPTION,
        epilog="Exit code: 0 causal, 1 something leaks, 2 bad input.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="the checkpoint")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (default: the run's validation text)")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json (default: the run's)")
    parser.add_argument(
        "--phase",
        choices=("causal", "train", "warmup"),
        default="causal",
        help="whose routing is audited: inference (default), training, or training before the switch to thresholds",
    )
    parser.add_argument("--num_sequences", type=_at_least(2), default=8, metavar="B", help="batch size (default: 8)")
    parser.add_argument(
        "--sequence_length", type=_at_least(4), metavar="S", help="tokens per sequence (default: the model's context)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the tokens that replace text (default: 1)")
    return parser


def _at_least(low: int) -> Any:
    def number(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value}: must be at least {low}")
        return value

    return number


def _load(ckpt_path: Path) -> tuple[Decoder, str]:
    """The checkpoint's decoder with its weights and state, and the name of its routing rule."""
    from lightning_moe.cli.checkpoint import read_checkpoint
    from lightning_moe.module import LanguageModel

    checkpoint = read_checkpoint(ckpt_path)
    hyperparameters = checkpoint.get("hyper_parameters", {})
    if "decoder" not in hyperparameters:
        raise UserError(f"ckpt_path={str(ckpt_path)!r}: not written by lightning_moe (it has no model.decoder)")
    module = LanguageModel.from_hyperparameters(hyperparameters)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise UserError(f"ckpt_path={str(ckpt_path)!r}: its weights do not fit its configuration: {error}") from error
    routing = hyperparameters["routing"]
    return module.decoder, "dense" if routing is None else str(routing["class_path"]).rpartition(".")[2]


def _text(ckpt_path: Path, text: str | None, tokenizer: str | None, num_sequences: int, length: int) -> Tensor:
    """int64 [num_sequences, length]: the beginning of the text."""
    import torch

    wanted = num_sequences * length
    if text is not None:
        ids = _tokenizer(ckpt_path, tokenizer).encode(_read(text))[:wanted]
    elif tokenizer is not None:
        raise UserError(f"--tokenizer {tokenizer}: it encodes --text; give that too, or neither.")
    else:
        ids = _run_data(ckpt_path).store.tokens("validation")[:wanted].tolist()
    if len(ids) < wanted:
        raise UserError(
            f"{'the validation text' if text is None else text} has {len(ids)} tokens, but {num_sequences} sequences "
            f"of {length} take {wanted}: give more text, or a smaller --num_sequences or --sequence_length."
        )
    return torch.tensor(ids, dtype=torch.int64).view(num_sequences, length)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: {error}") from None


def _tokenizer(ckpt_path: Path, file: str | None) -> Tokenizer:
    from lightning_moe.data.tokenizer import Tokenizer

    return _run_data(ckpt_path).tokenizer if file is None else Tokenizer.load(file)


def _run_data(ckpt_path: Path) -> Any:
    """The data module of the run that wrote the checkpoint, prepared."""
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser

    from lightning_moe.cli.rundir import CONFIG_FILE, run_of_checkpoint
    from lightning_moe.data import TextDataModule

    folder = run_of_checkpoint(ckpt_path)
    if folder is None:
        raise UserError(
            f"ckpt_path={str(ckpt_path)!r}: no {CONFIG_FILE} of a run around it, so its text and tokenizer are not known: "
            "give --text and --tokenizer."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextDataModule, "data")
    try:
        config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        data = parser.instantiate_classes(parser.parse_object({"data": config["data"]})).data
    except (ArgumentError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG_FILE}: data: {error}") from error
    data.prepare_data()
    data.setup("validate")
    return data
