"""``audit``: whether a checkpoint's routing and output depend on anything but a token's own past."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_moe.errors import UserError

if TYPE_CHECKING:
    from lightning_moe.data import TextDataModule, Tokenizer
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
    import torch

    from lightning_moe.cli.quiet import quiet

    quiet()
    from lightning_moe.audit import audit, format_report
    from lightning_moe.cli.checkpoint import read_checkpoint
    from lightning_moe.routing import Phase

    ckpt_path = Path(options.ckpt_path)
    checkpoint = read_checkpoint(ckpt_path)
    decoder, rule = _load(ckpt_path, checkpoint)
    length = options.sequence_length or decoder.config.max_sequence_length
    tokenizer, ids = _tokens(ckpt_path, options.text, options.tokenizer)
    _check_tokenizer(tokenizer, decoder, checkpoint)
    wanted = options.num_sequences * length
    if len(ids) < wanted:
        raise UserError(
            f"{options.text or 'the validation text'} has {len(ids)} tokens, but {options.num_sequences} sequences of "
            f"{length} take {wanted}: give more text, or a smaller --num_sequences or --sequence_length."
        )
    text = torch.tensor(ids[:wanted], dtype=torch.int64).view(-1, length)
    findings = audit(decoder.double(), text, Phase(options.phase), options.seed)
    print(f"{ckpt_path}: {rule}, phase {options.phase}, {options.num_sequences} sequences of {length} tokens\n")
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


def _load(ckpt_path: Path, checkpoint: dict[str, Any]) -> tuple[Decoder, str]:
    """The checkpoint's decoder with its weights and state, and the name of its routing rule."""
    from lightning_moe.module import LanguageModel

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


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: {error}") from None


def _tokens(ckpt_path: Path, text: str | None, tokenizer_file: str | None) -> tuple[Tokenizer, list[int]]:
    """All the text as token ids, and the tokenizer that they are of."""
    from lightning_moe.data import Tokenizer

    if tokenizer_file is not None:
        if text is None:
            raise UserError(f"--tokenizer {tokenizer_file}: it encodes --text; give that too, or neither.")
        tokenizer = Tokenizer.load(tokenizer_file)
        return tokenizer, tokenizer.encode(_read(text))
    data = _run_data(ckpt_path)
    ids = data.store.tokens("validation").tolist() if text is None else data.tokenizer.encode(_read(text))
    return data.tokenizer, ids


def _check_tokenizer(tokenizer: Tokenizer, decoder: Decoder, checkpoint: dict[str, Any]) -> None:
    """Under another tokenizer than its own, text is noise to the model."""
    expected = checkpoint.get("TextDataModule", {}).get("data", {}).get("tokenizer", tokenizer.fingerprint)
    size = decoder.config.vocab_size
    if tokenizer.fingerprint != expected or tokenizer.vocab_size != size:
        raise UserError(
            f"the tokenizer {tokenizer.fingerprint} ({tokenizer.vocab_size} tokens) is not the checkpoint's, "
            f"{expected} ({size} tokens): give that one with --tokenizer, and --text."
        )


def _run_data(ckpt_path: Path) -> TextDataModule:
    """The data module of the run that wrote the checkpoint, prepared."""
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser

    from lightning_moe.cli.rundir import CONFIG_FILE, run_of_checkpoint
    from lightning_moe.data import TextDataModule

    folder = run_of_checkpoint(ckpt_path)
    if folder is None:
        raise UserError(
            f"ckpt_path={str(ckpt_path)!r}: no {CONFIG_FILE} of a run around it, so its text and tokenizer are not "
            "known: give --text and --tokenizer."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextDataModule, "data")
    try:
        config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        data = parser.instantiate(parser.parse_object({"data": config["data"]})).data
    except (ArgumentError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG_FILE}: data: {error}") from error
    assert isinstance(data, TextDataModule)
    data.prepare_data()
    data.setup("validate")
    return data
